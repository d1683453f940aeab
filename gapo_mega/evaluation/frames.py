"""Logs of runs as data frames of pandas: ``gapo_mega.read_run("runs/demo").steps``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapo_mega import optional
from gapo_mega.config.core_schema import parse_document
from gapo_mega.evaluation.files import POINTS_FOLDER, config_file
from gapo_mega.evaluation.series import METRICS_FILE, read_rows
from gapo_mega.evaluation.summary import SUMMARY_FILE
from gapo_mega.files import local

if TYPE_CHECKING:
    from pandas import DataFrame

# Columns that tell the runs of a sweep apart.
OF_POINTS = ("run", "method", "preference", "seed")
# Numbers of a whole step, whose second half may be the name of an objective: time/step, correction/weight.
_OF_STEPS = ("time", "memory", "logprob_difference", "correction", "rollout")
_HELDOUT = {"heldout": "score", "heldout_gain": "gain", "heldout_gain_error": "gain_error"}


@dataclass(frozen=True)
class _Logged:
    """One run, as its directory has it now."""

    directory: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def point(self) -> dict[str, Any]:
        chosen = self.config.get("scalarization") or self.config.get("aggregation") or {}
        options = chosen.get("options", {})
        preference = options.get("preference", options.get("weights"))
        return {
            "run": self.directory.name,
            "method": chosen.get("name"),
            "preference": None if preference is None else tuple(preference),
            "seed": self.config.get("seed"),
        }

    @property
    def gradients(self) -> list[str]:
        """What the log has numbers of: the objectives, and rows of their own."""
        names = [str(objective["name"]) for objective in self.config.get("objectives", [])]
        keys = {key: None for row in self.rows for key in row}  # audited steps have more than others
        others = [key.partition("/")[2] for key in keys if key.startswith("grad_norm/")]
        return list(dict.fromkeys([*names, *others]))

    @property
    def summary(self) -> dict[str, Any]:
        """Of a run that has ended; empty for one that has not, or has trained on since."""
        path = self.directory / SUMMARY_FILE
        if not path.is_file():
            return {}
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        algorithm = self.config.get("algorithm", {})
        of_a_step = int(algorithm.get("ppo_epochs", 1)) * int(algorithm.get("minibatches", 1))
        # Without its steps: of an earlier version.
        trained_on = "steps" in found and len(self.rows) > found["steps"] * of_a_step
        return {} if trained_on else found


class RunFrames:
    """The run in a directory, or all runs of a sweep's; each frame is made when it is first asked for.

    Of a sweep, every frame begins with the columns ``run`` (the point's name), ``method``, ``preference`` (a
    tuple; None without one) and ``seed``. Runs may still be running.
    """

    def __init__(self, runs: Sequence[_Logged], of_sweep: bool) -> None:
        self._runs = runs
        self._of_sweep = of_sweep

    @cached_property
    def steps(self) -> DataFrame:
        """A row for every optimizer step, a column for every key of ``metrics.jsonl``; null is NaN."""
        found = self._frame((run, row) for run in self._runs for row in run.rows)
        numbers = [column for column in found.columns if column not in (*OF_POINTS, "step")]
        types: dict[str, str] = {**dict.fromkeys(numbers, "float64"), "step": "int64"}
        return found.astype(types)

    @cached_property
    def objectives(self) -> DataFrame:
        """Long form: ``step``, ``objective``, ``quantity`` (``reward``, ``weight``, ...), ``value``.

        Of every number of ``metrics.jsonl`` that belongs to one objective, or to another row of the Gram
        matrix, such as ``kl``. Those of pairs, such as cosines, are in ``steps`` alone.
        """
        columns = ("step", "objective", "quantity", "value")
        return self._frame(self._quantities(), columns).astype({"step": "int64", "value": "float64"})

    @cached_property
    def heldout(self) -> DataFrame:
        """Held-out scores while training: ``step``, ``objective``, ``score``, ``gain``, ``gain_error``.

        ``gain`` is the paired change since before training, ``gain_error`` its standard error. Runs on data
        have their measures in the place of objectives. No rows without evaluations while training.
        """
        columns = ("step", "objective", *_HELDOUT.values())
        found = self._frame(self._evaluations(), columns)
        return found.astype({"step": "int64", **dict.fromkeys(_HELDOUT.values(), "float64")})

    @cached_property
    def summary(self) -> DataFrame:
        """Held-out means of trainings that have ended, a row an objective.

        Columns ``objective``, ``before``, ``after``, ``standard_error`` of the paired difference over
        ``samples`` prompts.
        """
        rows = (
            (run, {"objective": name, **change})
            for run in self._runs
            for name, change in run.summary.get("objectives", {}).items()
        )
        numbers = ("before", "after", "standard_error", "samples")
        return self._frame(rows, ("objective", *numbers)).astype(dict.fromkeys(numbers, "float64"))

    @cached_property
    def runs(self) -> DataFrame:
        """A row a run: ``directory``, ``steps`` in the log, whether it has ``ended``; if so ``seconds``, and
        ``of_step``, the step that ``summary`` is of.
        """
        rows = (
            (
                run,
                {
                    "directory": str(run.directory),
                    "steps": len(run.rows),
                    "ended": bool(run.summary),
                    "seconds": run.summary.get("seconds"),
                    "of_step": run.summary.get("step"),
                },
            )
            for run in self._runs
        )
        columns = ("directory", "steps", "ended", "seconds", "of_step")
        return self._frame(rows, columns).astype({"seconds": "float64", "of_step": "float64"})

    def _quantities(self) -> Iterator[tuple[_Logged, dict[str, Any]]]:
        for run in self._runs:
            known = set(run.gradients)
            for row in run.rows:
                for key, value in row.items():
                    quantity, slash, name = key.partition("/")
                    if slash and name in known and quantity not in (*_HELDOUT, *_OF_STEPS):
                        about = {"step": row["step"], "objective": name, "quantity": quantity}
                        yield run, {**about, "value": value}

    def _evaluations(self) -> Iterator[tuple[_Logged, dict[str, Any]]]:
        for run in self._runs:
            for row in run.rows:
                found: dict[str, dict[str, Any]] = {}
                for key, value in row.items():
                    quantity, slash, name = key.partition("/")
                    if slash and quantity in _HELDOUT:
                        found.setdefault(name, {})[_HELDOUT[quantity]] = value
                for name, values in found.items():
                    yield run, {"step": row["step"], "objective": name, **values}

    def _frame(
        self, rows: Iterator[tuple[_Logged, Mapping[str, Any]]], columns: Sequence[str] = ()
    ) -> DataFrame:
        """Rows with the columns that tell runs apart before them; ``columns``: that are there in any case."""
        from pandas import DataFrame

        told: dict[Path, dict[str, Any]] = {}
        whole: list[dict[str, Any]] = []
        for run, row in rows:
            point = told.setdefault(run.directory, run.point if self._of_sweep else {})
            whole.append({**point, **row})
        first = [*(OF_POINTS if self._of_sweep else ()), *columns]
        names = list(dict.fromkeys([*first, *(key for row in whole for key in row)]))
        return DataFrame(whole, columns=names)


def read_run(directory: str | Path) -> RunFrames:
    """The log of the run in ``directory``, or of every point of a sweep's ``output_dir`` that has begun.

    It may be running. Raises ``ValueError`` where nothing has been logged, for a line that is none of a log,
    and without pandas.
    """
    probe = optional.pandas()
    if not probe.usable:
        raise ValueError(f"read_run: pandas is {probe.found}; run `pip install pandas` (lost: {probe.lost})")
    place = local(directory)
    of_sweep = (place / POINTS_FOLDER).is_dir()
    places = sorted((place / POINTS_FOLDER).iterdir()) if of_sweep else [place]
    runs = [_read(each) for each in places if (each / METRICS_FILE).is_file()]
    if not any(run.rows for run in runs):
        raise ValueError(
            f"run directory: found no steps in {place}, accepted: a directory that a run or a sweep has "
            "written"
        )
    return RunFrames(runs, of_sweep)


def _read(directory: Path) -> _Logged:
    path = config_file(directory)
    config = parse_document(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return _Logged(directory, config, read_rows(directory / METRICS_FILE))
