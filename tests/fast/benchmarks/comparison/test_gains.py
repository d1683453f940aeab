"""Gains in units of the spread at the start, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison import gains
from tests.helpers.sweep_files import BEFORE, sweep, write_answers


def test_gains_are_in_units_of_the_spread(tmp_path: Path) -> None:
    one = sweep(
        tmp_path / "a", {("gdpo", 1): {"rare": 0.25, "dense": 5.0}, ("gdpo", 2): {"rare": 0.5, "dense": 4.0}}
    )
    two = sweep(tmp_path / "b", {("sum", 1): {"rare": -0.125, "dense": 10.0}})
    points = gains.read([one, two])
    units = {name: np.std(scores) for name, scores in BEFORE.items()}
    assert points[0].gains == pytest.approx({"rare": 0.25 / units["rare"], "dense": 5.0 / units["dense"]})
    assert points[2].worst == pytest.approx(-0.125 / units["rare"])
    assert points[1].mean == pytest.approx((0.5 / units["rare"] + 4.0 / units["dense"]) / 2)
    # Four rows gain 1/2 to 3/2 of the mean by thirds; two of a prompt have 2/3 and 4/3 on average.
    assert points[0].errors["dense"] == pytest.approx(5.0 / units["dense"] / 3)
    head, _, first, second, _, known = gains.table(points).splitlines()
    assert known.startswith(
        "Standard error of one run's gain over its held-out prompts, mean of all runs: rare "
    )
    assert head.startswith("| method | seeds | worst gain | mean gain | rare | dense | hurt |")
    worst = [0.25 / units["rare"], 4.0 / units["dense"]]
    error = np.std(worst, ddof=1) / np.sqrt(2)
    assert (
        first.startswith(f"| a: gdpo | 2 | {np.mean(worst):.2f} ±{error:.2f} |")
        and "| 0 of 4 | 0.33 ±0.00 |" in first
    )
    assert second.startswith("| b: sum | 1 | -0.29 |") and "| 1 of 2 |  |" in second


def test_judges_have_a_table_of_their_own(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "a", {("gdpo", 1): {"rare": 0.25, "dense": 5.0}})
    with pytest.raises(ValueError, match=r"gdpo-seed1: found no judged_answers\.jsonl, accepted: runs that"):
        gains.read([folder], gains.JUDGED)
    write_answers(
        folder / "points" / "gdpo-seed1" / gains.JUDGED, [{"other": 1.0}, {"other": 3.0}], {"other": -0.5}
    )
    assert gains.read([folder], gains.JUDGED)[0].gains == pytest.approx({"other": -0.5})


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no results\.json, accepted: output directories"):
        gains.read([tmp_path])
    none = sweep(tmp_path / "none", {})
    with pytest.raises(ValueError, match="found no point that has ended"):
        gains.read([none])
