"""A gradient that the method does not see and that takes part with the sum of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gapo_mega.aggregation.base import NonFiniteGramError, nonfinite_objectives
from gapo_mega.ops import Aggregated, AggregationMethod, Status, beyond_range


class Apart(AggregationMethod):
    """Weights ``(w, beta sum_i w_i)`` for the rows of the objectives and the KL, w by a method that sees
    the objectives' Gram matrix alone.

    The same direction as the KL's gradient, times beta, added to every objective's: but a component that all
    rows share would hide from the method how they disagree.
    """

    def __init__(self, method: AggregationMethod, beta: Callable[[], float]) -> None:
        """``beta``: asked anew for every Gram matrix."""
        self._method = method
        self._beta = beta

    def weigh(self, gram: Tensor) -> Aggregated:
        """``gram``: [M + 1, M + 1], the KL's row last."""
        found = self._method.weigh(gram[:-1, :-1].contiguous())
        proposed = torch.cat([found.proposed, self._beta() * found.proposed.sum().view(1)])
        broken = (found.status == Status.OK) & ~gram[-1].isfinite().all()
        return Aggregated.of(gram, proposed, found.status.masked_fill(broken, int(Status.NOT_FINITE)))

    def error(self, found: Aggregated) -> ValueError:
        status = Status(int(found.status))
        if status == Status.NOT_FINITE:
            return NonFiniteGramError(nonfinite_objectives(found.gram.cpu()))
        told = _objectives(found)
        if status == Status.OUT_OF_RANGE and _fits(told):
            return ValueError(
                f"algorithm.kl_beta: found {self._beta()}, with which the KL row has the last of "
                f"{beyond_range(found)}; accepted: a number that gives it a weight within that range"
            )
        return self._method.error(told)

    def commit(self, found: Aggregated) -> None:
        self._method.commit(_objectives(found))


def _objectives(found: Aggregated) -> Aggregated:
    """What the method answered, without the KL's row."""
    return Aggregated(
        found.gram[:-1, :-1].contiguous(), found.weights[:-1], found.status, found.proposed[:-1]
    )


def _fits(told: Aggregated) -> bool:
    """Whether the objectives' weights alone are in range."""
    return Aggregated.of(told.gram, told.proposed, torch.zeros_like(told.status)).ok()
