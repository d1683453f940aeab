"""The report of a run: pictures, and one HTML page that holds them all.

The page is self-contained (pictures embedded, no script, nothing fetched), so it can be mailed or opened
from a cluster's file system.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from gapo_mega.config import Config
from gapo_mega.evaluation.files import config_file, write_text
from gapo_mega.evaluation.plots import Picture, colour, write_pictures
from gapo_mega.evaluation.series import Series, read_series
from gapo_mega.evaluation.summary import SUMMARY_FILE, Summary, read_resumed, read_summary

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


def write_report(run_dir: Path, samples: Sequence[SamplePair]) -> Path:
    """Write ``report/`` (PNG pictures and ``index.html``) into a run directory; returns the page's path.

    Reads the run's configuration, ``metrics.jsonl`` and, where prompts were held out, ``summary.json``.
    Raises ``ValueError`` where nothing has been logged.
    """
    series = read_series(run_dir)
    config_text = config_file(run_dir).read_text(encoding="utf-8")
    config = Config.model_validate(yaml.safe_load(config_text))
    names = [objective.name for objective in config.objectives]
    path = run_dir / SUMMARY_FILE
    summary, seconds = read_summary(path) if path.exists() else ({}, 0.0)
    resumed = read_resumed(path) if path.exists() else []
    directory = run_dir / REPORT_FOLDER
    directory.mkdir(exist_ok=True)
    pictures = write_pictures(directory, series, names, summary)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gapo_mega.evaluation", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        title=run_dir.resolve().name,
        objectives=_objective_rows(summary),
        facts=[*_facts(config, series, seconds if summary else None), *_resumed_facts(resumed)],
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


def _objective_rows(summary: Summary) -> list[dict[str, Any]]:
    rows = []
    for name, found in summary.items():
        ratio = found.in_standard_errors
        verdict = "unclear" if ratio is None or abs(ratio) <= 2 else "better" if ratio > 0 else "worse"
        error = found.standard_error if math.isfinite(found.standard_error) else None
        facts = asdict(found) | {"standard_error": error, "change": found.difference}
        rows.append({"name": name, **facts, "ratio": ratio, "verdict": verdict})
    return rows


def _facts(config: Config, series: Series, seconds: float | None) -> list[tuple[str, str]]:
    """Label and text of what a reader wants to know about the run at a glance."""
    rollout, parallel = config.rollout, config.parallel
    options = ", ".join(f"{key}={value}" for key, value in config.aggregation.options.items())
    facts = [
        ("Policy", config.model.path),
        ("Method", f"{config.aggregation.name}({options})"),
        ("Optimizer steps", f"{len(series.steps)}"),
        ("Samples per step", f"{rollout.prompts_per_step} prompts × {rollout.samples_per_prompt}"),
        ("Response length", f"at most {rollout.max_new_tokens} tokens"),
        ("Advantages", config.advantages.name),
        ("Learning rate", f"{config.optimizer.lr:g} ({config.optimizer.name}, {config.optimizer.schedule})"),
        ("KL weight", f"{config.algorithm.kl_beta:g}"),
        ("Parallel", f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, {config.model.dtype}"),
        ("Seed", f"{config.seed}"),
        ("Throughput", f"{np.nanmedian(series['tokens_per_second']):,.0f} tokens/s (median)"),
        ("Peak memory", f"{np.nanmax(series['memory/peak_bytes']) / 2**30:.2f} GiB per rank"),
    ]
    skipped = int(np.nansum(series["skipped"]))
    if skipped:
        facts.append(("Skipped steps", f"{skipped} (a gradient was not finite)"))
    if seconds is not None:
        facts.append(("Wall-clock time", _duration(seconds)))
    return facts


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
    """Mean seconds of every phase of a step, longest first, with its share of the longest."""
    means = {
        key.removeprefix("time/"): float(np.nanmean(values))
        for key, values in series.values.items()
        if key.startswith("time/") and np.isfinite(values).any()
    }
    longest = max(means.values(), default=0.0)
    return [
        {"name": name.replace("_", " "), "seconds": mean, "share": mean / longest if longest else 0.0}
        for name, mean in sorted(means.items(), key=lambda item: -item[1])
    ]


def _embedded(directory: Path, picture: Picture) -> dict[str, str]:
    data = base64.b64encode((directory / picture.file).read_bytes()).decode("ascii")
    return {"caption": picture.caption, "file": picture.file, "data": f"data:image/png;base64,{data}"}
