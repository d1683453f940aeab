"""What every policy loss shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from gapo_mega.losses.normalization import Normalization
from gapo_mega.types import Experience


class PolicyLoss(ABC):
    """Turns the policy's log-probabilities into the loss of one objective.

    Options are the fields of the (data)class that implements it; ``__post_init__`` checks them.
    """

    name: ClassVar[str]
    # Whether its gradient is not that of its value, because a factor counts as a constant.
    stops_gradient: ClassVar[bool] = False
    # What the engine divides the sum by (``normalization.divisor``). A class with this as an option returns
    # ``normalization.total``.
    normalization: Normalization = "token_mean"

    @abstractmethod
    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        """The *sum* over the response tokens of ``batch``: a scalar with a graph to ``logprobs_BT`` [B, T].

        The engine sums it over microbatches and ranks and divides by the number of response tokens, or as
        ``normalization`` says, so the loss must not depend on which rows share a batch. It reads only the
        advantages of ``objective``. Positions off the response add exactly 0 to the loss and to the gradient,
        whatever they hold, NaN included.
        """

    @property
    def clips(self) -> tuple[str, ...]:
        """Names of the bounds at which ``clipped`` looks; none by default."""
        return ()

    def clipped(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        """Where each of ``clips`` holds a response token back: bool ``[len(clips), B, T]``, off it False.

        Asked without a graph, for the log only.
        """
        rows, columns = batch.response_mask_BT.shape
        return batch.response_mask_BT.new_zeros(len(self.clips), rows, columns)


AnyLoss = Callable[[Tensor, Experience, int], Tensor]  # a PolicyLoss, or a function that returns such a sum


def clips_of(loss: AnyLoss) -> tuple[str, ...]:
    """The bounds of a loss; none of a plain function."""
    return loss.clips if isinstance(loss, PolicyLoss) else ()


def normalization_of(loss: AnyLoss) -> Normalization:
    """How a loss is to be divided; a plain function as the base says."""
    return loss.normalization if isinstance(loss, PolicyLoss) else PolicyLoss.normalization
