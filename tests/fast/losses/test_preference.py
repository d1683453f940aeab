"""Losses of preference pairs against their formulas, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gapo_mega.losses.preference import dpo_losses, ipo_losses

DIFFERENCE = np.array([0.0, 1.5, -2.0, 40.0, -40.0, 900.0, -900.0])
MARGIN = np.array([0.0, 0.3, -0.7, 2.0, 0.1, 1.0, -3.0])


def minus_log_sigmoid(z: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -z)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("beta", "weight"), [(0.1, 1.0), (0.5, 0.25)])
def test_dpo_and_modpo(beta: float, weight: float, smoothing: float) -> None:
    z = (beta * DIFFERENCE - MARGIN) / weight
    expected = (1 - smoothing) * minus_log_sigmoid(z) + smoothing * minus_log_sigmoid(-z)
    difference_P = torch.tensor(DIFFERENCE, requires_grad=True)
    found_P = dpo_losses(
        difference_P, torch.tensor(MARGIN), beta=beta, weight=weight, label_smoothing=smoothing
    )
    np.testing.assert_allclose(found_P.detach().numpy(), expected, rtol=1e-12)
    (slope_P,) = torch.autograd.grad(found_P.sum(), difference_P)
    sigmoid = np.exp(-minus_log_sigmoid(z))
    np.testing.assert_allclose(
        slope_P.numpy(), beta / weight * (sigmoid - 1 + smoothing), rtol=1e-9, atol=1e-15
    )


def test_ipo() -> None:
    found_P = ipo_losses(torch.tensor(DIFFERENCE), beta=0.2)
    np.testing.assert_allclose(found_P.numpy(), (DIFFERENCE - 2.5) ** 2, rtol=1e-12)
