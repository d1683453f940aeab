"""The report of a run: pictures, and one HTML page that holds them all.

The page is self-contained (pictures embedded, no script, nothing fetched), so it can be mailed or opened
from a cluster's file system.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gapo_mega.config import Config
from gapo_mega.config.core_schema import parse_document
from gapo_mega.evaluation.colours import colour
from gapo_mega.evaluation.files import config_file, write_text
from gapo_mega.evaluation.pages import page_of
from gapo_mega.evaluation.series import Array, Series, read_series
from gapo_mega.evaluation.standing import Standing
from gapo_mega.evaluation.summary import (
    ONE_RUN,
    SUMMARY_FILE,
    Summary,
    read_resumed,
    read_standing,
    read_summary,
)
from gapo_mega.evaluation.terms import in_metric, parameters_measured

if TYPE_CHECKING:
    from gapo_mega.evaluation.plots import Picture

REPORT_FOLDER = "report"
REPORT_PAGE = "index.html"


@dataclass(frozen=True)
class SamplePair:
    """Responses of the policy to one held-out prompt before and after training, with their scores."""

    prompt: str
    before: str
    after: str
    scores_before: Mapping[str, float]
    scores_after: Mapping[str, float]


def write_report(
    run_dir: Path, samples: Sequence[SamplePair], running: tuple[Summary, Standing] | None = None
) -> Path:
    """Write ``report/`` (PNG pictures and ``index.html``) into a run directory; returns the page's path.

    Reads the run's configuration, ``metrics.jsonl`` and, where prompts were held out, ``summary.json``.
    ``running``: of a run that has not ended, and so has no summary: its latest evaluation.
    Raises ``ValueError`` where nothing has been logged.
    """
    series = read_series(run_dir)
    config_text = config_file(run_dir).read_text(encoding="utf-8")
    config = Config.model_validate(parse_document(config_text))
    names = [objective.name for objective in config.objectives]
    found = _Held.of(run_dir / SUMMARY_FILE, running)
    summary, standing = found.summary, found.standing
    label = "after" if standing is None else standing.label
    directory = run_dir / REPORT_FOLDER
    directory.mkdir(exist_ok=True)
    gradients = config.gradients
    rows = _rows(config, series)
    # The first picture is made of others that stand below it.
    # Half a second, of which ranks that write no page, and commands that refuse, need none.
    from gapo_mega.evaluation.plots import write_pictures

    _, *pictures = write_pictures(directory, series, names, summary, gradients, rows, label)
    page = page_of(
        "report.html.jinja",
        title=run_dir.resolve().name,
        measured_over=parameters_measured(gradients) + in_metric(gradients),
        one_run=ONE_RUN,
        state=_state(standing),
        running=standing is not None and not standing.ended,
        label=label,
        chosen=_chosen(standing),
        objectives=_objective_rows(summary),
        facts=[*_facts(config, series, found.seconds if summary else None), *_resumed_facts(found.resumed)],
        phases=_phases(series),
        pictures=[_embedded(directory, picture) for picture in pictures],
        samples=samples,
        names=names,
        colours={name: colour(i) for i, name in enumerate(names)},
        config_text=config_text,
    )
    path = directory / REPORT_PAGE
    write_text(path, page)
    return path


@dataclass(frozen=True)
class _Held:
    """What is known of the held-out prompts: from a summary, or from a run that has none yet."""

    summary: Summary
    standing: Standing | None  # None: not known, as of a run of an earlier version
    seconds: float | None = None
    resumed: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, path: Path, running: tuple[Summary, Standing] | None) -> _Held:
        if running is not None:
            return cls(*running)
        if not path.exists():
            return cls({}, None)
        summary, seconds = read_summary(path)
        return cls(summary, read_standing(path), seconds, read_resumed(path))


def _state(standing: Standing | None) -> str:
    """How far the run is, and when this was."""
    written = f"written at {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    if standing is None:
        return f"Report {written}"
    return f"{standing.sentence()}, {written}"


def _chosen(standing: Standing | None) -> str | None:
    """What the reader has to know of numbers of a step that was chosen by them."""
    if standing is None or standing.best is None:
        return None
    best = standing.best
    if not standing.ended:
        return f"The best so far is {best.sentence()}."
    several = (
        "It was chosen by these very prompts, so that its numbers and intervals are too favourable; other "
        "prompts (gapo-mega evaluate --prompts) tell how good it is."
        if best.evaluations > 1
        else ""
    )
    told = f"The result of the run (held-out numbers, responses, exported model) is of {best.sentence()}."
    return f"{told} {several}".strip()


def _rows(config: Config, series: Series) -> list[str] | None:
    """Whose gradients the log of a run with a scalarizer has; None: those of the objectives."""
    if config.one_signal is None:
        return None
    audited = [row for row in config.audited_rows if f"grad_norm/{row}" in series.values]
    return audited or list(config.rows)


def _method(config: Config) -> str:
    chosen = config.scalarization or config.aggregation
    options = ", ".join(f"{key}={value}" for key, value in chosen.options.items())
    return f"{chosen.name}({options})" + (", one gradient" if config.one_signal else "")


def _objective_rows(summary: Summary) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            **asdict(found),
            "standard_error": found.standard_error if math.isfinite(found.standard_error) else None,
            "change": found.difference,
            "ratio": found.in_standard_errors,
            "finding": found.finding,
            "sentence": found.sentence(),
        }
        for name, found in summary.items()
    ]


def _facts(config: Config, series: Series, seconds: float | None) -> list[tuple[str, str]]:
    """Label and text of what a reader wants to know about the run at a glance."""
    rollout, parallel = config.rollout, config.parallel
    facts = [
        ("Policy", config.model.path),
        ("Method", _method(config)),
        ("Optimizer steps", f"{len(series.steps)}"),
        ("Samples per rollout", f"{rollout.prompts_per_step} prompts × {rollout.samples_per_prompt}"),
        ("Response length", f"at most {rollout.max_new_tokens} tokens"),
        ("Advantages", config.advantages.name),
        ("Learning rate", f"{config.optimizer.lr:g} ({config.optimizer.name}, {config.optimizer.schedule})"),
        ("KL weight", f"{config.algorithm.kl_beta:g} ({config.algorithm.kl})"),
        ("Parallel", f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, {config.model.dtype}"),
        ("Seed", f"{config.seed}"),
        ("Throughput", _throughput(series)),
        (
            "Peak memory",
            _known(series["memory/peak_bytes"] / 2**30, np.max, "{:.2f} GiB on the rank with the most"),
        ),
    ]
    skipped = series["skipped"] > 0
    if skipped.any():
        # The log of the run has the reasons; the metrics say no more than whose gradient was not finite.
        flags = [values > 0 for key, values in series.values.items() if key.startswith("nonfinite/")]
        nonfinite = int((skipped & np.any(flags, axis=0)).sum()) if flags else 0
        facts.append(("Skipped steps", f"{int(skipped.sum())} (in {nonfinite} a gradient was not finite)"))
    if seconds is not None:
        facts.append(("Wall-clock time", _duration(seconds)))
    return facts


def _throughput(series: Series) -> str:
    """Tokens over seconds of all steps: only the first update of a rollout holds the rollout's time."""
    rates = series["tokens_per_second"]
    seconds = series.values.get("time/step", np.ones(len(rates)))
    known = np.isfinite(rates) & np.isfinite(seconds)
    total = seconds[known].sum()
    return f"{(rates * seconds)[known].sum() / total:,.0f} tokens/s" if total > 0 else "not known"


def _known(values: Array, of: Callable[[Array], Any], text: str) -> str:
    """``text`` with a statistic of the finite values, or that there are none."""
    finite = values[np.isfinite(values)]
    return text.format(of(finite)) if len(finite) else "not known"


def _resumed_facts(resumed: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Where the run went on with other settings than it had before."""
    return [
        (
            f"Changed after step {each['step']}",
            ", ".join(f"{name}: {old} → {new}" for name, (old, new) in each["changed"].items()),
        )
        for each in resumed
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _phases(series: Series) -> list[dict[str, Any]]:
    """Seconds of every phase, over all optimizer steps, and how long its bar is; longest first.

    A phase that only some steps have, as the first minibatch of a rollout, counts 0 in the others.
    """
    means = {
        key.removeprefix("time/"): float(np.nansum(values)) / len(values)
        for key, values in series.values.items()
        if key.startswith("time/") and np.isfinite(values).any()
    }
    longest = max(means.values(), default=0.0)
    return [
        {"name": name.replace("_", " "), "seconds": mean, "bar": mean / longest if longest else 0.0}
        for name, mean in sorted(means.items(), key=lambda item: -item[1])
    ]


def _embedded(directory: Path, picture: Picture) -> dict[str, str]:
    data = base64.b64encode((directory / picture.file).read_bytes()).decode("ascii")
    return {"caption": picture.caption, "file": picture.file, "data": f"data:image/png;base64,{data}"}
