"""Rates of improvement that follow a preference and what has been reached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the mean of the rates.
_LEAST, _MOST = 0.02, 50.0


def adaptive_rates(preference: Sequence[float] | None, progress: Tensor, eta: float) -> Tensor:
    """``s_i = u_i exp(-eta (progress_i / (M u_i) - mean))``, cut to [0.02, 50] times their mean; float64 [M].

    Who has progressed less than its share is to improve faster. ``progress`` [M] is in units of each
    objective's spread (``gapo_mega.progress``); ``M u_i`` is 1 for an equal preference, so that ``eta`` means
    the same for any number of objectives.
    """
    count = len(progress)
    shares = torch.ones(count, dtype=torch.float64)
    if preference is not None:
        shares = torch.tensor(preference, dtype=torch.float64) * (count / sum(preference))
    lag = progress / shares
    log_rates = shares.log() - eta * (lag - lag.mean())
    rates = (log_rates - log_rates.max()).exp()
    return (rates / rates.mean()).clamp(_LEAST, _MOST)
