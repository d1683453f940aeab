"""Problems of several objectives in an order of their own, so that no answer depends on the given one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import cosine_matrix
from gapo_mega.aggregation.on_host import HostMethod, Solution

_PARALLEL = 8 * torch.finfo(torch.float64).eps


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

    def select(self, order: Sequence[int]) -> Problem:
        """The gradients ``order``."""
        index = torch.tensor(order)
        return replace(
            self,
            cosines=self.cosines[index][:, index],
            norms=self.norms[index],
            numbers=self.numbers[index],
        )


def in_canonical_order(gram: Tensor, numbers: Tensor, solve: Callable[[Problem], Solution]) -> Solution:
    """What ``solve`` gives for the gradients of ``gram`` [K, K] and their ``numbers`` [K], in their order.

    It sees them sorted by what is known of each. So the same gradients in another order get the same weights
    to the last digit, also where a problem has several solutions or a jump. Gradients that could change
    places without changing the problem share their weights.
    """
    norms = gram.diagonal().sqrt()
    exponent = int(torch.frexp(norms.max()).exponent)
    cosines = cosine_matrix(gram)
    cosines = (cosines + cosines.T) / 2
    # What is parallel up to rounding is parallel: else the rounding would order what is alike.
    cosines = torch.where((1 - cosines.abs()).abs() <= _PARALLEL, cosines.sign(), cosines)
    given = Problem(cosines, torch.ldexp(norms, torch.tensor(-exponent)), numbers, exponent)
    order, alike = _arranged(given)
    found = solve(given.select(order))
    weights = torch.empty_like(norms)
    weights[order] = found.weights
    for group in alike:
        weights[group] = weights[group].mean()
    return Solution(weights, found.log_factor, found.status)


def _arranged(problem: Problem) -> tuple[list[int], list[list[int]]]:
    """An order that depends on the problem alone, and the groups that could change places in it."""
    rows = problem.cosines.tolist()
    norms, numbers = problem.norms.tolist(), problem.numbers.tolist()
    keys = [(numbers[i], norms[i], sorted(zip(rows[i], norms, strict=True))) for i in range(len(rows))]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    ties = [list(tied) for _, tied in groupby(order, key=keys.__getitem__)]
    if len(ties) == len(rows):
        return order, []

    def starting_with(first: int) -> list[int]:
        """Ties are broken by what is known of the gradients that were taken before."""
        taken = [first]
        left = [i for i in order if i != first]
        while left:
            following = min(left, key=lambda i: (keys[i], [rows[i][j] for j in taken]))
            taken.append(following)
            left.remove(following)
        return taken

    def form(first: int) -> tuple[object, ...]:
        sorted_problem = problem.select(starting_with(first))
        return tuple(part.tolist() for part in (sorted_problem.cosines, sorted_problem.norms))

    alike = []
    for tied in ties:
        forms = [(form(i), i) for i in tied]
        forms.sort(key=lambda pair: pair[0])
        groups = [[i for _, i in same] for _, same in groupby(forms, key=lambda pair: pair[0])]
        alike += [group for group in groups if len(group) > 1]
        if tied is ties[0]:
            order = starting_with(groups[0][0])
    return order, alike


class CanonicalMethod(HostMethod):
    """A ``HostMethod`` whose formula sees a ``Problem``; every objective's number is 1/K."""

    in_every_audit: ClassVar[bool] = False

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
