"""PCGrad's orders and Nash-MTL's kept weights: from committed steps alone, and exact through a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from gapo_mega import ops
from gapo_mega.aggregation import build


def grams(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(count)]
    rows = [each - 0.9 * each.mean(dim=0) for each in rows]
    return [each @ each.T for each in rows]


def walked(method: Any, steps: list[Tensor]) -> list[Tensor]:
    """The weights of steps that the optimizer takes, with a skipped one in between."""
    found = []
    for gram in steps:
        ops.solve(gram * 7, method)
        answer = ops.solve(gram, method)
        method.commit(answer)
        found.append(answer.weights)
    return found


METHODS: list[tuple[str, dict[str, Any]]] = [("pcgrad", {"seed": 3}), ("nash_mtl", {"every": 3})]


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_a_resumed_run_and_another_rank_have_the_same_weights(name: str, options: dict[str, Any]) -> None:
    steps = grams(8)
    straight = walked(build(name, **options), steps)
    torch.manual_seed(99)  # no rank's global stream matters
    for at in (1, 4, 5):
        first, second = build(name, **options), build(name, **options)
        before = walked(first, steps[:at])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        torch.rand(1)
        for weights, expected in zip(before + walked(second, steps[at:]), straight, strict=True):
            assert torch.equal(weights, expected)


def test_pcgrad_draws_other_orders_at_every_step_and_with_every_seed() -> None:
    gram = grams(1)[0]
    along = walked(build("pcgrad"), [gram] * 6)
    seeds = [build("pcgrad", seed=seed)(gram) for seed in range(6)]
    for found in (along, seeds):
        assert len({tuple(weights.tolist()) for weights in found}) >= 4


def test_nash_mtl_keeps_its_weights_for_so_many_steps() -> None:
    steps = grams(7)
    found = walked(build("nash_mtl", every=3, max_norm=None), steps)
    for step, weights in enumerate(found):
        assert torch.equal(weights, build("nash_mtl", max_norm=None)(steps[step - step % 3]))
    # The length is capped by the step's own gradients.
    for gram, weights, free in zip(steps, walked(build("nash_mtl", every=3), steps), found, strict=True):
        length = float((free @ gram @ free).sqrt())
        torch.testing.assert_close(weights, free * min(1.0, 1.0 / length), rtol=1e-12, atol=0)


def test_nash_mtl_finds_new_weights_for_an_objective_that_had_no_gradient() -> None:
    steps = grams(3)
    steps[0][1], steps[0][:, 1] = 0.0, 0.0
    steps[2][3], steps[2][:, 3] = 0.0, 0.0
    found = walked(build("nash_mtl", every=10, max_norm=None), steps)
    assert float(found[0][1]) == 0.0
    assert torch.equal(found[1], build("nash_mtl", max_norm=None)(steps[1]))
    assert torch.equal(found[2], found[1] * (steps[2].diagonal() > 0))  # kept for those that are left


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pcgrad", {"seed": -1}, "seed: found -1, accepted: an integer >= 0"),
        ("pcgrad", {"seed": True}, "seed: found True"),
        ("nash_mtl", {"every": 0}, "every: found 0, accepted: an integer >= 1"),
        ("nash_mtl", {"max_norm": 0}, "max_norm: found 0, accepted: a finite number > 0, or null"),
        ("nash_mtl", {"preference": [1.0, 0.0]}, "preference: .* > 0 with sum 1"),
        ("fairgrad", {"preference": [1.0, 0.0]}, "preference: .* > 0 with sum 1"),
        ("fairgrad", {"alpha": 0}, "alpha: found 0, accepted: a finite number > 0"),
        ("upgrad", {"preference": [1.5, -0.5]}, "preference: .* >= 0 with sum 1"),
        ("dual_proj", {"preference": [0.5, 0.6]}, "preference: found"),
        ("cagrad", {"c": 1.0}, "c: found 1.0, accepted: a number >= 0 and < 1"),
        ("cagrad_clip", {"c": -0.1}, "c: found -0.1"),
        ("imtl_g", {"ascend": 1}, "ascend: found 1, accepted: true, false"),
        (
            "mgda_decoupled",
            {"losses": [1.0, 0.0]},
            "losses: found .*, accepted: a list of finite numbers > 0",
        ),
        ("weighted_sum", {"safe": 1}, "safe: found 1, accepted: true, false"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", ["upgrad", "dual_proj", "cagrad", "cagrad_clip", "aligned_mtl"])
def test_a_preference_may_have_zeros(name: str) -> None:
    gram = grams(1)[0]
    weights = build(name, preference=[0.5, 0.5, 0.0, 0.0])(gram)
    assert bool(weights.isfinite().all() & weights.any())
    gram[[0, 1]], gram[:, [0, 1]] = 0.0, 0.0  # what is left has nothing but zeros
    left = torch.tensor([2, 3])
    expected = build(name)(gram[left][:, left])
    assert torch.equal(build(name, preference=[0.5, 0.5, 0.0, 0.0])(gram)[left], expected)
