"""What every policy loss shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from gapo_mega.types import Experience


class PolicyLoss(ABC):
    """Turns the policy's log-probabilities into the loss of one objective.

    Options are the fields of the (data)class that implements it; ``__post_init__`` checks them.
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        """The *sum* over the response tokens of ``batch``: a scalar with a graph to ``logprobs_BT`` [B, T].

        The engine sums it over microbatches and ranks and divides by the number of response tokens, so the
        loss must not depend on which rows share a batch. It reads only the advantages of ``objective``.
        Positions off the response add exactly 0 to the loss and to the gradient, whatever they hold, NaN
        included.
        """
