"""What every engine shares."""

from __future__ import annotations

import pytest
import torch

from gapo_mega.engine.base import generator_seed


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 1764340000000 * 1_000_003, -(2**61)])
def test_seeds_that_a_generator_takes_stay(seed: int) -> None:
    assert generator_seed(seed) == seed


@pytest.mark.parametrize("seed", [2**62, 2**63, 2**64, -(2**64) - 5, 1764340000000000000 * 1_000_003, 10**30])
def test_longer_seeds_are_cut_and_stay_different(seed: int) -> None:
    """Nanoseconds of a clock are such a seed; each step makes its own from a multiple."""
    first, second = (
        torch.Generator().manual_seed(generator_seed(s)).initial_seed() for s in (seed, seed + 1)
    )
    assert first != second and 0 <= first < 2**62
