"""Writes a comparison of models: tables in several formats, and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gapo_mega.evaluation.answers import Answer
from gapo_mega.evaluation.colours import colour
from gapo_mega.evaluation.comparison import Comparison
from gapo_mega.evaluation.comparison_tables import FORMATS, as_json, interval, notes, text_tables
from gapo_mega.evaluation.files import write_text
from gapo_mega.evaluation.intervals import Estimate
from gapo_mega.evaluation.pages import page_of

JSON_FILE, PAGE = "evaluation.json", "index.html"


def write_comparison(
    directory: Path,
    comparison: Comparison,
    answers: Mapping[str, Sequence[Answer]],
    about: Mapping[str, Any],
    shown: int,
) -> None:
    """Write ``evaluation.md``, ``.csv``, ``.tex``, ``.json`` and ``index.html`` into ``directory``.

    ``shown``: prompts whose first responses are on the page.
    """
    for name, form in FORMATS.items():
        write_text(directory / name, form(comparison))
    write_text(directory / JSON_FILE, as_json(comparison, about))
    write_text(directory / PAGE, page(directory.resolve().name, comparison, answers, about, shown))


def page(
    title: str,
    comparison: Comparison,
    answers: Mapping[str, Sequence[Answer]],
    about: Mapping[str, Any],
    shown: int,
) -> str:
    """One HTML page that needs nothing else: no script, nothing fetched."""
    names = [model.name for model in comparison.models]
    return page_of(
        "comparison.html.jinja",
        title=title,
        names=names,
        colours={name: colour(index) for index, name in enumerate(names)},
        about=about,
        charts=_charts(comparison),
        tables=text_tables(comparison),
        notes=notes(comparison),
        prompts=_shown(answers, comparison.samples, shown),
    )


def _charts(comparison: Comparison) -> list[dict[str, Any]]:
    """For every measure, where each model's mean and interval lie, in percent of the width."""
    charts = []
    for key, label in comparison.measures.items():
        found = {m.name: m.estimates[key] for m in comparison.models if key in m.estimates}
        ends = [end for e in found.values() for end in (e.mean, e.low, e.high) if end is not None]
        low, high = min(ends), max(ends)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low, width = low - margin, high - low + 2 * margin
        rows = [_chart_row(name, estimate, low, width) for name, estimate in found.items()]
        charts.append({"label": label, "rows": rows})
    return charts


def _chart_row(name: str, estimate: Estimate, low: float, width: float) -> dict[str, Any]:
    def place(value: float) -> float:
        return 100 * (value - low) / width

    begin = place(estimate.mean if estimate.low is None else estimate.low)
    end = place(estimate.mean if estimate.high is None else estimate.high)
    return {
        "name": name,
        "text": interval(estimate),
        "mean": place(estimate.mean),
        "begin": begin,
        "length": end - begin,
    }


def _shown(answers: Mapping[str, Sequence[Answer]], samples: int, count: int) -> list[dict[str, Any]]:
    """The first prompts, with the first response of every model."""
    first = {name: each[::samples][:count] for name, each in answers.items()}
    found: list[dict[str, Any]] = []
    for rows in zip(*first.values(), strict=True):
        found.append({"prompt": rows[0].prompt, "responses": dict(zip(first, rows, strict=True))})
    return found
