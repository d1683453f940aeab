"""Gram matrices of running means, against means that are formed."""

from __future__ import annotations

import pytest
import torch

from gapo_mega.aggregation.averaging import averaged_grams


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
def test_grams_are_those_of_means_that_hold_the_gradients(beta, batch):
    generator = torch.Generator().manual_seed(1)
    means = torch.zeros(*batch, 2, 7, dtype=torch.float64)
    for updates in range(4):
        rows = torch.randn(*batch, 2, 7, generator=generator, dtype=torch.float64)
        both = torch.cat([means, rows], dim=-2)
        gram, averaged = averaged_grams(both @ both.mT, beta, updates)
        means = beta * means + (1 - beta) * rows
        unbiased = means / (1 - beta ** (updates + 1))
        torch.testing.assert_close(gram, rows @ rows.mT)
        # beta 0.99: the sum of products loses two digits where its terms cancel.
        torch.testing.assert_close(averaged, unbiased @ unbiased.mT, rtol=1e-9, atol=1e-9)
