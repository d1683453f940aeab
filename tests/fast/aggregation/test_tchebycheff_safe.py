"""Weights that follow progress, and their projection, against NumPy, SciPy and the scalarizer of the name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from gapo_mega import scalarization
from gapo_mega.aggregation import build, diagnose

PREFERENCE = [0.5, 0.3, 0.2]
STEPS = [
    ([1.0, -20.0, 0.1], [2.0, 100.0, 0.0]),
    ([2.0, 5.0, 0.3], [1.0, 90.0, 0.05]),
    ([1.5, 30.0, 0.4], [1, 1, 1]),
]


def numbers(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def steered(mu: float) -> np.ndarray:
    """After ``STEPS``. The samples of the third were all alike at first: its unit is the second spread."""
    start, unit = np.array(STEPS[0][0]), np.array([2.0, 100.0, 0.05])
    progress = np.zeros(3)
    for means, _ in STEPS[1:]:
        progress = 0.9 * progress + 0.1 * (np.array(means) - start) / unit
    weights = np.array(PREFERENCE) * np.exp(-progress / mu)
    return weights / weights.sum() / unit


def opposed(seed: int) -> Tensor:
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[0] = -rows[1:].sum(dim=0) + 0.5 * rows[0]
    return rows


@pytest.mark.parametrize("mu", [0.05, 1.0])
def test_it_starts_from_the_weights_of_progress(mu: float) -> None:
    method = build("tchebycheff_safe", preference=PREFERENCE, mu=mu, safe=False)
    gram = opposed(0) @ opposed(0).T
    np.testing.assert_allclose(method(gram).numpy(), PREFERENCE, rtol=1e-12)  # nothing has been observed
    for means, spreads in STEPS:
        method.observe(numbers(means), numbers(spreads))
    np.testing.assert_allclose(method(gram).numpy(), steered(mu), rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_hurt_and_nothing_is_nearer(seed: int) -> None:
    """``argmin ||rows' v||, v >= w0`` by SciPy: v = w0 + x, x >= 0."""
    rows = opposed(seed)
    method = build("tchebycheff_safe", preference=PREFERENCE, mu=0.5)
    for means, spreads in STEPS:
        method.observe(numbers(means), numbers(spreads))
    gram = rows @ rows.T
    weights = method(gram)
    given = steered(0.5)
    found, _ = nnls(rows.numpy().T, -rows.numpy().T @ given)
    # Norms within 1 of each other: conditions below 1e6.
    np.testing.assert_allclose(rows.numpy().T @ weights.numpy(), rows.numpy().T @ (given + found), atol=1e-9)
    assert diagnose(gram, weights).hurt == []
    assert diagnose(gram, torch.from_numpy(given)).hurt != [], "else the test shows nothing"


def test_the_scalarizer_of_that_name_has_the_same_weights() -> None:
    """Its coefficients follow from scores; the method is told their means and spreads."""
    generator = torch.Generator().manual_seed(0)
    scalarizer = scalarization.build("tchebycheff", preference=PREFERENCE, mu=0.2)
    scalarizer.prepare(["a", "b", "c"])
    method = build("tchebycheff_safe", preference=PREFERENCE, mu=0.2, safe=False)
    group_B, lengths_B = torch.arange(4).repeat_interleave(3), torch.full((12,), 5)
    for step in range(4):
        scores_MB = torch.randn(3, 12, generator=generator) * numbers([[1.0], [10.0], [0.1]]) + step
        method.observe(scores_MB.mean(dim=1), scores_MB.std(dim=1, correction=0))
        expected = scalarizer.coefficients(scores_MB, group_B, lengths_B)
        torch.testing.assert_close(method(torch.eye(3, dtype=torch.float64)), expected, rtol=1e-12, atol=0)
        scalarizer.commit(scores_MB, group_B, lengths_B)


def test_a_checkpoint_holds_the_progress() -> None:
    method, resumed = build("tchebycheff_safe"), build("tchebycheff_safe")
    assert method.state_dict() == {}
    for means, spreads in STEPS:
        method.observe(numbers(means), numbers(spreads))
    resumed.load_state_dict(json.loads(json.dumps(method.state_dict())))
    gram = opposed(1) @ opposed(1).T
    assert torch.equal(resumed(gram), method(gram))
    with pytest.raises(ValueError, match="found state"):
        resumed.load_state_dict({"orders": 3})


def test_wrong_options_are_named() -> None:
    for mu in (0, -1, "small", float("nan")):
        with pytest.raises(ValueError, match=r"^aggregation.*mu: found .*accepted: a finite number > 0"):
            build("tchebycheff_safe", mu=mu)
    with pytest.raises(ValueError, match="preference: found"):
        build("tchebycheff_safe", preference=[1.0, 0.0])
    method = build("tchebycheff_safe")
    method.observe(numbers([1.0, 2.0]), numbers([1.0, 1.0]))
    with pytest.raises(ValueError, match=r"^progress: found 2 objectives, accepted: the 3"):
        method(torch.eye(3, dtype=torch.float64))
