"""What every aggregation method would have done in a run: reads the run's log, trains nothing."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gapo_mega.aggregation import build, methods
from gapo_mega.config import Config, GradientConfig
from gapo_mega.config.loading import load
from gapo_mega.evaluation.audit_plot import Curve, write_picture
from gapo_mega.evaluation.files import config_file, replacing
from gapo_mega.evaluation.recording import Recording, read_recording
from gapo_mega.evaluation.series import Array
from gapo_mega.evaluation.verdicts import Verdict, candidates, disagreement, judge, of_scalarizer
from gapo_mega.registry import unknown

_TABLE, _PICTURE = "audit.csv", "audit.png"
_FIRST_COLUMNS = ["step", "method", "conflict", "corner", "direction_norm"]
_LEGEND = (
    "share: w over the sum of |w|, mean over the steps. cosine: of the direction with the objective's "
    "gradient, the predicted change of a step of unit length over the gradient's norm. hurt: steps "
    "where it is negative. conflict: steps that hurt an objective, and which one most often. corner: steps "
    "with weight 0 for an objective that has a gradient. All of it is to first order and along this run: "
    "another method would have led elsewhere."
)


@dataclass(frozen=True)
class Audit:
    """The verdicts on every method, the run's own first unless it was not asked for."""

    recording: Recording
    gradients: GradientConfig
    verdicts: list[Verdict]
    warning: str | None  # where the log's weights are not those of the run's own method


def run_audit(
    run_dir: Path, only: Sequence[str] = (), out: Path | None = None, console: Console | None = None
) -> None:
    """Audit the run in ``run_dir``: write ``audit.csv`` and ``audit.png`` to ``out``, print a table.

    ``out`` is ``run_dir/audit`` if left out; ``only`` names the methods to show, all if empty. Raises
    ``ValueError`` for a log that it cannot read, unknown methods, and an ``out`` that it cannot write to.
    """
    console = console or Console()
    audit = audit_run(run_dir, only)
    directory = target_of(run_dir, out)
    _check_target(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_csv(audit, directory / _TABLE)
        write_picture(directory / _PICTURE, *curves(audit))
    except OSError as error:
        raise ValueError(
            f"--out: cannot write to {directory} ({error.strerror}), accepted: a directory to write to"
        ) from None
    print_audit(audit, run_dir.resolve().name, console)
    # Readers copy the path, so it must stay in one piece.
    for file in (_TABLE, _PICTURE):
        console.print(f"wrote {directory / file}", soft_wrap=True, markup=False, highlight=False)


def target_of(run_dir: Path, out: Path | None) -> Path:
    """Where an audit of ``run_dir`` is written. Raises ``ValueError`` where ``run_dir`` is no directory."""
    _check_run_dir(run_dir)
    return run_dir / "audit" if out is None else out


def audit_run(run_dir: Path, only: Sequence[str] = ()) -> Audit:
    """Ask the paper's methods, or those in ``only``, what it would have done at each step of ``run_dir``."""
    _check_run_dir(run_dir)
    config = load(config_file(run_dir))
    if config.one_signal is not None:
        return _of_scalarized(run_dir, config, only)
    name = _own_name(config)
    _check_known(only, {*methods(), name})
    recording = read_recording(
        run_dir,
        config.aggregated,
        averaged=config.aggregation.average > 0,
        given=config.scalarization is not None,
    )
    own, *others = candidates(config, recording.given)
    wanted = [c for c in others if (c.aggregator.name in only if only else c.aggregator.in_every_audit)]
    verdicts = judge([own, *wanted], recording)
    warning = disagreement(verdicts[0], recording)
    if only and name not in only:
        verdicts = verdicts[1:]
    return Audit(recording, config.gradients, verdicts, warning)


def _own_name(config: Config) -> str:
    """What makes the weights of the run's updates: its aggregator, or a safe scalarizer."""
    if config.scalarization is not None:
        return config.scalarization.row
    return build(config.aggregation.name, **config.aggregation.options).name


def _of_scalarized(run_dir: Path, config: Config, only: Sequence[str]) -> Audit:
    """The audited steps of a run with a scalarizer: what its gradient did, and what methods would have."""
    assert config.one_signal is not None
    row = config.one_signal.row
    _check_known(only, {*methods(), row})
    names = [*(objective.name for objective in config.objectives), row]
    whole = read_recording(run_dir, names, audited=True)
    recording = whole.first(len(names) - 1)
    wanted = [c for c in candidates(config) if not only or c.aggregator.name in only]
    verdicts = judge(wanted, recording)
    if not only or row in only:
        verdicts.insert(0, of_scalarizer(row, whole))
    return Audit(recording, config.gradients, verdicts, None)


def _check_known(only: Sequence[str], known: Collection[str]) -> None:
    for name in only:
        if name not in known:
            raise ValueError(unknown("--method", name, sorted(known)))


def _check_run_dir(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise ValueError(f"run directory: {run_dir} not found, accepted: a directory that a run has written")


def _check_target(directory: Path) -> None:
    """Raise ``ValueError`` for a file of something else under the name of one that an audit writes."""
    table = directory / _TABLE
    own = table.is_file() and table.read_bytes().startswith(",".join(_FIRST_COLUMNS).encode())
    for path in (table, directory / _PICTURE):
        if path.exists() and not own:
            raise ValueError(
                f"--out: found {path}, which no audit has written; accepted: another directory, or move it"
            )


def curves(audit: Audit) -> tuple[list[str], Array, list[Curve]]:
    """Objectives, all steps of the run, and one curve a method with NaN at the steps left out."""
    recording = audit.recording
    steps = np.array(sorted([*recording.steps, *recording.left_out]), dtype=float)
    places = np.searchsorted(steps, recording.steps)
    found = []
    for verdict in audit.verdicts:
        cosines = np.full((len(steps), len(recording.names)), math.nan)
        cosines[places] = verdict.cosines
        hurt = verdict.hurt.mean(axis=0)
        found.append(Curve(verdict.candidate.label, cosines, hurt, float(verdict.conflict.mean())))
    return recording.names, steps, found


def write_csv(audit: Audit, path: Path) -> None:
    """One line per step and method, every number in full precision."""
    names = audit.recording.names
    kinds = ("weight", "predicted_change", "cosine", "hurt")
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        columns = [f"{kind}/{name}" for kind in kinds for name in names]
        writer.writerow([*_FIRST_COLUMNS, *columns])
        for index, step in enumerate(audit.recording.steps):
            for v in audit.verdicts:
                facts = [int(v.conflict[index]), int(v.corner[index]), float(v.direction_norms[index])]
                numbers = [*v.weights[index], *v.predicted_change[index], *v.cosines[index]]
                hurt = [int(x) for x in v.hurt[index]]
                writer.writerow([step, v.candidate.label, *facts, *map(float, numbers), *hurt])


def print_audit(audit: Audit, title: str, console: Console) -> None:
    """Print the table, what its columns mean, where the numbers come from, and the warning."""
    console.print(audit_table(audit, title))
    for line in (_LEGEND, *_origin(audit)):
        console.print(line, style="dim", markup=False, highlight=False)
    if audit.warning is not None:
        console.print(f"warning: {audit.warning}", style="yellow", markup=False, highlight=False)


def _origin(audit: Audit) -> list[str]:
    """Where the numbers come from."""
    gradients, recording = audit.gradients, audit.recording
    lines = [
        f"Inner products as the run measured them: metric {gradients.metric}, scope {gradients.scope}, "
        f"store {gradients.store} ({gradients.store_dtype})."
    ]
    if gradients.metric == "adam":
        lines.append("Metric adam: norms, cosines and changes are weighted by 1 / (sqrt(v) + eps) of Adam.")
    if gradients.scope != "full":
        lines.append("Only the parameters in scope are seen; the update was of all.")
    if recording.left_out:
        count = len(recording.left_out)
        lines.append(f"Left out: {count} of {count + len(recording.steps)} steps, skipped by the run.")
    return lines


def audit_table(audit: Audit, title: str) -> Table:
    """One row per method, with a line for every objective in it."""
    names = audit.recording.names
    table = Table(
        title=f"{escape(title)}: every method, asked at each step ({len(audit.recording.steps)})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_lines=True,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", style="bold", overflow="fold", min_width=16)
    table.add_column("objective", overflow="fold")
    for column in ("share", "cosine\nmean", "cosine\nlowest", "hurt", "conflict", "corner"):
        table.add_column(column, justify="right", no_wrap=True)
    for verdict in audit.verdicts:
        candidate = verdict.candidate
        note = f"\n[not bold dim]{escape(candidate.note)}[/]" if candidate.note else ""
        table.add_row(
            escape(candidate.label) + note,
            "\n".join(escape(name) for name in names),
            "\n".join(_share(share) for share in verdict.shares.mean(axis=0)),
            "\n".join(_signed(cosine) for cosine in verdict.cosines.mean(axis=0)),
            "\n".join(_signed(cosine) for cosine in verdict.cosines.min(axis=0)),
            "\n".join(f"{hurt:.1%}" for hurt in verdict.hurt.mean(axis=0)),
            _conflict(verdict, names),
            f"{verdict.corner.mean():.1%}",
        )
    return table


def _share(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.3f}"


def _signed(cosine: float) -> str:
    text = f"{cosine:+.3f}"
    return f"[red]{text}[/red]" if cosine < -0.0005 else text  # -0.000 is rounding or hardly more


def _conflict(verdict: Verdict, names: Sequence[str]) -> str:
    share = f"{verdict.conflict.mean():.1%}"
    if not verdict.conflict.any():
        return share
    worst = names[int(verdict.hurt.sum(axis=0).argmax())]
    return f"[red]{share}[/red]\n{escape(worst)}"
