"""The example of a sweep is the front of the demo's two objectives."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapo_mega.config.loading import load
from gapo_mega.config.sweep import SweepConfig
from gapo_mega.planning import methods
from gapo_mega.runs.sweep_points import points_of

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_five_preferences_of_two_methods_with_three_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the base lies beside the sweep's file
    points, notes = points_of(load(EXAMPLES / "sweep.yaml", kind=SweepConfig), EXAMPLES / "sweep.yaml")
    assert len(points) == 2 * 5 * 3 and not notes
    assert [p.preference for p in points[::3]] == [
        (0.1, 0.9),
        (0.3, 0.7),
        (0.5, 0.5),
        (0.7, 0.3),
        (0.9, 0.1),
    ] * 2
    assert {p.method for p in points} == {"p_gapo", "weighted_sum"} and {p.seed for p in points} == {1, 2, 3}
    demo = methods.load(EXAMPLES / "demo.yaml")
    for point in points:
        # Fewer prompts, so that thirty points take an afternoon; the rest is the demo's.
        fewer = {"heldout_prompts": point.config.data.heldout_prompts}
        assert point.config.data == demo.data.model_copy(update=fewer)
        fewer = {"prompts_per_step": point.config.rollout.prompts_per_step}
        assert point.config.rollout == demo.rollout.model_copy(update=fewer)
        assert point.config.aggregation.options["scale"] == "mean_norm"  # steps of one length
        assert point.config.checkpoint.every_steps > 0
