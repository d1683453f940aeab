"""Problems of several objectives in an order of their own, so that no answer depends on the given one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.aggregation.base import cosine_matrix
from gapo_mega.aggregation.on_host import HostMethod, Solution


@dataclass(frozen=True)
class Problem:
    """K gradients other than zero, in units of a power of two in which the longest has a norm in [1/2, 1).

    No product of two norms overflows, and multiplying all gradients by a power of two changes nothing but
    ``exponent``. All tensors are float64, on the CPU.
    """

    cosines: Tensor  # [K, K], symmetric, with a unit diagonal
    norms: Tensor  # [K]
    numbers: Tensor  # [K]: one of each objective, such as its share in a preference
    exponent: int  # the norms are norms * 2^exponent

    @property
    def gram(self) -> Tensor:
        """Their Gram matrix [K, K] in those units."""
        return self.cosines * self.norms[:, None] * self.norms[None, :]


def in_canonical_order(gram: Tensor, numbers: Tensor, solve: Callable[[Problem], Solution]) -> Solution:
    """What ``solve`` gives for the gradients of ``gram`` [K, K] and their ``numbers`` [K], in the given
    order.

    It sees them sorted by what is known of each. So the same gradients in another order get the same
    weights to the last digit, also where a problem has several solutions or a jump. Gradients that are alike
    in everything, to the last digit, share their weights.
    """
    norms = gram.diagonal().sqrt()
    exponent = int(torch.frexp(norms.max()).exponent)
    cosines = cosine_matrix(gram)
    cosines = (cosines + cosines.T) / 2
    norms = torch.ldexp(norms, torch.tensor(-exponent))
    keys = [
        (number, norm, sorted(zip(row, norms.tolist(), strict=True)))
        for number, norm, row in zip(numbers.tolist(), norms.tolist(), cosines.tolist(), strict=True)
    ]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    found = solve(Problem(cosines[order][:, order], norms[order], numbers[order], exponent))
    weights = torch.empty_like(norms)
    weights[order] = found.weights
    alike = (cosines[:, None, :] == cosines[None, :, :]).all(dim=2)
    alike &= (norms[:, None] == norms) & (numbers[:, None] == numbers)
    shared = (alike * weights).sum(dim=1) / alike.sum(dim=1)
    return Solution(shared, found.log_factor, found.status)


class CanonicalMethod(HostMethod):
    """A ``HostMethod`` whose formula sees a ``Problem``; every objective's number is 1/K."""

    @abstractmethod
    def combine(self, problem: Problem) -> Solution:
        """Weights for the gradients *in the units of the problem*, where they are to have none 2^-exponent.

        Most formulas give the same weights in all units; ``log_factor`` has the factor of the others.
        """

    def numbers(self, active: Sequence[int]) -> Tensor:
        """One number for each of the objectives ``active``, float64 [K]."""
        return torch.full((len(active),), 1.0 / len(active), dtype=torch.float64)

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        return in_canonical_order(gram, self.numbers(active), self.combine)
