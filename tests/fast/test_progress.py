"""Progress: calibrated by the start, the same for every scale of the rewards, exact through a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from gapo_mega.progress import Progress


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def observed(means: list[list[float]], spreads: list[list[float]]) -> Progress:
    progress = Progress()
    for mean, spread in zip(means, spreads, strict=True):
        progress.observe(numbers(*mean), numbers(*spread))
    return progress


def test_it_is_a_running_mean_in_units_of_the_first_spread() -> None:
    """By hand: 0, then 0.1 * 2 = 0.2, then 0.9 * 0.2 + 0.1 * (-1) = 0.08; later spreads do not count."""
    progress = Progress()
    assert progress.value is None and progress.state_dict() == {}
    for mean, spread, expected in ((10.0, 5.0, 0.0), (20.0, 1.0, 0.2), (5.0, 99.0, 0.08)):
        progress.observe(numbers(mean), numbers(spread))
        assert progress.value is not None
        assert progress.value.tolist() == pytest.approx([expected], rel=1e-14)


def test_scale_and_offset_of_the_rewards_do_not_matter() -> None:
    means = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spreads = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor, offset = numbers(1e6, 1.0, 1e-6), numbers(-3.0, 5.0, 0.25)
    plain = observed(means.tolist(), spreads.tolist()).value
    scaled = observed((means * factor + offset).tolist(), (spreads * factor).tolist()).value
    assert plain is not None and scaled is not None
    # The third one's offset is 1e6 times its differences: float64 leaves 1e-10 of them.
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-9)


def test_an_objective_without_spread_has_its_unit_from_the_first_step_that_has_one() -> None:
    """By hand: none in steps 1 and 2; step 3 has unit 2, so 0.1 * (3 - 1) / 2; step 4 keeps the unit."""
    means, spreads = [[1.0], [7.0], [3.0], [5.0]], [[0.0], [0.0], [2.0], [0.5]]
    expected = [0.0, 0.0, 0.1, 0.9 * 0.1 + 0.1 * 2]
    for steps in range(1, 5):
        value = observed(means[:steps], spreads[:steps]).value
        assert value is not None and value.tolist() == pytest.approx([expected[steps - 1]], rel=1e-14)


def test_a_start_that_is_given_counts_and_the_first_step_is_one_like_any_other() -> None:
    """By hand: 0 at the start, then 0.1 * (10 - 4) / 2 = 0.3, then 0.9 * 0.3 + 0.1 * (5 - 4) / 2 = 0.32."""
    progress = Progress()
    progress.begin(numbers(4.0), numbers(2.0))
    for mean, expected in ((None, 0.0), (10.0, 0.3), (5.0, 0.32)):
        if mean is not None:
            progress.observe(numbers(mean), numbers(7.0))
        assert progress.value is not None
        assert progress.value.tolist() == pytest.approx([expected], rel=1e-14)
    before = progress.state_dict()
    progress.begin(numbers(-100.0), numbers(1.0))  # there is a start already
    assert progress.state_dict() == before


def test_a_given_start_without_spread_leaves_the_unit_to_the_first_step_that_has_one() -> None:
    progress = Progress()
    progress.begin(numbers(1.0), numbers(0.0))
    progress.observe(numbers(3.0), numbers(2.0))
    assert progress.value is not None and progress.value.tolist() == pytest.approx([0.1], rel=1e-14)


def test_a_resumed_run_goes_on_with_the_same_numbers() -> None:
    straight = observed([[1.0, 0.1], [1.7, 0.3]], [[0.3, 0.0], [0.2, 0.1]])
    resumed = Progress()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for progress in (straight, resumed):
        progress.observe(numbers(2.2, 0.7), numbers(0.1, 0.1))
    assert straight.state_dict() == resumed.state_dict()
    fresh = Progress()
    fresh.load_state_dict({})
    assert fresh.value is None


def test_what_it_gives_away_is_a_copy() -> None:
    progress, means = Progress(), numbers(1.0)
    progress.observe(means, numbers(1.0))
    means.fill_(9.0)
    value = progress.value
    assert value is not None
    value.fill_(9.0)
    assert progress.state_dict() == {"baseline": [1.0], "unit": [1.0], "value": [0.0]}


def test_another_number_of_objectives_and_another_state_are_refused() -> None:
    with pytest.raises(ValueError, match="progress: found 2 objectives, accepted: the 1 of the start"):
        observed([[1.0], [1.0, 2.0]], [[1.0], [1.0, 1.0]])
    with pytest.raises(
        ValueError, match=r"progress: found state \['mean'\], accepted: baseline, unit, value"
    ):
        Progress().load_state_dict({"mean": [1.0]})
