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
    LEAST_PROMPTS,
    Change,
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


@pytest.mark.parametrize("prompts", [2, 3, 10, 64, 500])
def test_the_interval_is_students_t_over_the_prompts(prompts: int) -> None:
    before, after = scores(prompts)
    for i, change in enumerate(paired_summary(before, after, NAMES).values()):
        expected = stats.ttest_rel(after[i], before[i]).confidence_interval(0.95)
        assert change.half_width is not None
        found = (change.difference - change.half_width, change.difference + change.half_width)
        assert found == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_a_claim_is_a_paired_t_test_at_five_percent(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(1, 30))
    after = before + rng.normal(0.3, 1.0, size=(1, 30))
    test = stats.ttest_rel(after[0], before[0])
    expected = "unclear" if test.pvalue >= 0.05 else "better" if test.statistic > 0 else "worse"
    assert paired_summary(before, after, ["a"])["a"].finding == expected


def test_samples_of_a_prompt_are_one_observation() -> None:
    """Forty samples of two prompts are two observations, however alike the samples of a prompt are."""
    before = np.zeros((1, 80))
    rng = np.random.default_rng(0)
    after = np.repeat([[1.0, 1.5]], 40, axis=1) + rng.normal(0, 1e-3, (1, 80))
    change = paired_summary(before, after, ["a"], samples_per_prompt=40)["a"]
    assert (change.samples, change.finding) == (2, "too few prompts")
    means = after.reshape(2, 40).mean(axis=1)
    assert change.standard_error == pytest.approx(stats.sem(means), rel=1e-12)


def float32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_a_spread_made_of_rounding_is_none(scale: float) -> None:
    """The same 0.1 everywhere: float32 makes differences of it that spread by a unit in the last place."""
    before = float32(np.random.default_rng(1).random((1, 64)))
    change = paired_summary(before * scale, (before + 0.1) * scale, ["a"])["a"]
    assert change.standard_error == 0 and change.in_standard_errors is None and change.half_width is None
    assert change.difference == pytest.approx(0.1 * scale, rel=1e-5)  # the rounding of the scores
    assert change.finding == "same on every prompt"


def test_the_two_prompts_that_were_thirteen_million_standard_errors_apart() -> None:
    before, after = float32([[0.1, 0.3]]), float32([[0.2, 0.4]])
    for one, other in ((before, after), (before.double(), after.double()), (before.numpy(), after.numpy())):
        change = paired_summary(one, other, ["a"])["a"]
        assert change.in_standard_errors is None and change.finding == "too few prompts"


@pytest.mark.parametrize("offset", [0.1, 1.0, -1e6])
def test_a_difference_made_of_rounding_is_no_change(offset: float) -> None:
    before = float32(np.random.default_rng(2).random((1, 32)) + offset)
    change = paired_summary(before, torch.nextafter(before, torch.full_like(before, math.inf)), ["a"])["a"]
    assert change.difference == 0 and change.standard_error == 0
    assert change.finding == "no change" and change.sentence() == "no change measured"


def test_a_difference_well_above_rounding_is_kept() -> None:
    rng = np.random.default_rng(3)
    before = float32(rng.random((1, 64)))
    after = before + float32(rng.normal(1e-5, 1e-6, (1, 64)))
    change = paired_summary(before, after, ["a"])["a"]
    assert change.finding == "better"
    # Differences of 1e-5 between float32 scores near 1 are themselves known to half a percent.
    assert change.difference == pytest.approx(1e-5, rel=0.05)


def test_scores_of_a_coarse_type_have_its_rounding() -> None:
    before = torch.rand(1, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = (before.float() + 0.1).bfloat16()
    assert paired_summary(before, after, ["a"])["a"].finding == "same on every prompt"
    assert paired_summary(before, before.float(), ["a"])["a"].finding == "no change"


def test_a_response_that_stayed_the_same_has_not_changed() -> None:
    """An objective that scores it differently the second time measures its own noise."""
    before, after = scores(40)
    same = np.arange(40) % 4 == 0
    found = paired_summary(before, after, NAMES, same_response=same.tolist())["helpful"]
    expected = np.where(same, 0.0, after[0] - before[0])
    assert found.difference == pytest.approx(expected.mean(), rel=1e-12)
    assert found.standard_error == pytest.approx(stats.sem(expected), rel=1e-12)
    unchanged = paired_summary(before, after, NAMES, same_response=[True] * 40)
    assert {change.finding for change in unchanged.values()} == {"no change"}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (Change(1.0, 1.0, math.nan, 1), "no change"),
        (Change(1.0, 2.0, math.nan, 1), "too few prompts"),
        (Change(1.0, 2.0, 1e-9, LEAST_PROMPTS - 1), "too few prompts"),
        (Change(1.0, 2.0, 0.0, 100), "same on every prompt"),
        (Change(math.nan, 2.0, 0.1, 100), "not known"),
        (Change(0.0, 0.2, 0.1, 10), "unclear"),  # t = 2.0, and 2.26 is needed with 9 degrees of freedom
        (Change(0.0, 0.2, 0.1, 100), "better"),  # 1.98 with 99
        (Change(0.0, -0.2, 0.1, 100), "worse"),
        (Change(1.0, 1.0, 0.1, 100), "unclear"),
    ],
)
def test_findings(change: Change, finding: str, tmp_path: Path) -> None:
    assert change.finding == finding
    stream = io.StringIO()
    print_summary(
        {"a": change}, None, Console(file=stream, width=80, color_system="standard", force_terminal=True)
    )
    coloured = {"better": "\x1b[32m", "worse": "\x1b[31m"}
    for name, code in coloured.items():
        assert (code in stream.getvalue()) == (finding == name)
    write_summary(tmp_path / "s.json", {"a": change}, 1.0)
    assert read_summary(tmp_path / "s.json")[0]["a"].finding == finding


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
def test_one_score_that_is_no_number_makes_the_change_unknown(score: float) -> None:
    before = np.linspace(0.0, 1.0, 20)[None]
    after = before + 0.5 + before**2
    after[0, 3] = score
    with np.errstate(invalid="ignore"):
        assert paired_summary(before, after, ["x"])["x"].finding == "not known"


def test_few_prompts_are_said_to_be_few_and_one_run_to_be_one() -> None:
    stream = io.StringIO()
    print_summary({"a": Change(1.0, 2.0, 0.1, 2)}, None, Console(file=stream, width=300))
    text = stream.getvalue()
    assert "too few prompts to tell a change from chance (2 of at least 10)" in text
    # 12.7 standard errors either way: with two prompts the interval is that wide.
    assert "interval of the change -0.271 to +2.27" in text
    assert "how much another seed changes, one run cannot tell" in text
