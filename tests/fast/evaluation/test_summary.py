"""Held-out summaries against scipy."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from gapo_mega.evaluation.console import print_summary
from gapo_mega.evaluation.summary import (
    paired_summary,
    read_summary,
    write_summary,
)

NAMES = ["helpful", "brevity"]


def scores(columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    before = rng.normal(size=(2, columns))
    return before, before + rng.normal([[0.4], [-0.1]], 0.5, size=(2, columns))


def test_standard_error_is_that_of_the_paired_difference() -> None:
    before, after = scores(64)
    summary = paired_summary(before, torch.from_numpy(after), NAMES)
    for i, name in enumerate(NAMES):
        facts = summary[name]
        assert facts.before == pytest.approx(before[i].mean(), rel=1e-12)
        assert facts.after == pytest.approx(after[i].mean(), rel=1e-12)
        assert facts.standard_error == pytest.approx(stats.sem(after[i] - before[i]), rel=1e-12)
        assert facts.samples == 64
        # The change in standard errors is the paired t statistic.
        expected = stats.ttest_rel(after[i], before[i]).statistic
        assert facts.in_standard_errors == pytest.approx(expected, rel=1e-9)


def test_samples_of_a_prompt_are_averaged_first() -> None:
    before, after = scores(24)
    facts = paired_summary(before, after, NAMES, samples_per_prompt=3)["helpful"]
    difference = np.array([(after[0] - before[0])[i : i + 3].mean() for i in range(0, 24, 3)])
    assert facts.samples == 8
    assert facts.standard_error == pytest.approx(stats.sem(difference), rel=1e-12)


def test_bad_shapes_are_named() -> None:
    before, after = scores(6)
    with pytest.raises(ValueError, match="before: found shape"):
        paired_summary(before[:1], after, NAMES)
    with pytest.raises(ValueError, match="after: found shape"):
        paired_summary(before, after[:, :4], NAMES)
    with pytest.raises(ValueError, match="samples_per_prompt: found 4"):
        paired_summary(before, after, NAMES, samples_per_prompt=4)


def test_summary_file(tmp_path: Path) -> None:
    before, after = scores(6)
    path = tmp_path / "summary.json"
    write_summary(path, paired_summary(before, after, NAMES), seconds=12.5)
    document = json.loads(path.read_text())
    assert set(document) == {"objectives", "seconds"} and document["seconds"] == 12.5
    assert set(document["objectives"]["brevity"]) == {"before", "after", "standard_error", "samples"}
    assert read_summary(path) == (paired_summary(before, after, NAMES), 12.5)


def test_one_prompt_has_no_standard_error(tmp_path: Path) -> None:
    summary = paired_summary([[1.0]], np.array([[2.0]]), ["only"])  # type: ignore[arg-type]
    assert math.isnan(summary["only"].standard_error)
    write_summary(tmp_path / "s.json", summary, 1.0)
    assert json.loads((tmp_path / "s.json").read_text())["objectives"]["only"]["standard_error"] is None
    (found,) = read_summary(tmp_path / "s.json")[0].values()
    assert math.isnan(found.standard_error) and found.in_standard_errors is None


def test_console_table_shows_every_number_in_eighty_columns() -> None:
    before, after = scores(64)
    summary = paired_summary(before, after, ["helpful", "a_name_of_twenty_let"])
    stream = io.StringIO()
    print_summary(summary, Path("/runs/" + "x" * 90), Console(file=stream, width=80))
    text = stream.getvalue()
    facts = summary["helpful"]
    assert f"{facts.before:.4g}" in text and f"{facts.after:.4g}" in text
    assert f"{facts.in_standard_errors:+.1f}" in text and "64" in text
    assert "/runs/" + "x" * 90 in text
