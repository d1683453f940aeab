"""Within-group correlation against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gapo_mega.rollout.facts import reward_correlation


def test_correlation_within_groups_is_pearson_of_the_centred_scores() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat([7, 3, 11, 5], 6)
    values = rng.normal(size=(3, 24))
    values[1] -= 0.6 * values[0]
    centred = values.copy()
    for g in np.unique(group):
        centred[:, group == g] -= centred[:, group == g].mean(axis=1, keepdims=True)
    offsets = 100.0 * group  # easy and hard prompts: must not matter
    result = reward_correlation(torch.from_numpy(values + offsets), torch.from_numpy(group))
    # Offsets of 1e3 cost about three digits of float64.
    np.testing.assert_allclose(result.numpy(), np.corrcoef(centred), atol=1e-10)


def test_correlation_of_a_constant_objective_is_nan() -> None:
    values = torch.stack([torch.linspace(0, 1, 8), torch.full((8,), 0.1)])
    result = reward_correlation(values, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert result[0, 0] == pytest.approx(1.0) and torch.isnan(result[0, 1]) and torch.isnan(result[1, 1])
