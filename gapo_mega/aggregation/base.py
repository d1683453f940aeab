"""What every aggregation method shares: its contract, its two common options, its checks.

A method turns the Gram matrix ``G_ij = <g_i, g_j>`` of the M objective gradients into weights
``w``, and the training engine then writes ``sum_i w_i g_i``. Nothing of the size of the model is
seen here, so a method is a small pure function on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

ZeroGradient = Literal["exclude", "stop"]
Scale = Literal["none", "sum_to_one", "mean_norm"]


class NonFiniteGramError(ValueError):
    """The Gram matrix holds NaN or Inf; ``objectives`` are the indices of the gradients at fault."""

    def __init__(self, objectives: list[int]) -> None:
        self.objectives = objectives
        super().__init__(
            f"gram: the gradients of objectives {objectives} are not finite; no weights follow from them"
        )


class ZeroGradientError(ValueError):
    """An objective has a zero gradient and ``zero_gradient`` is ``stop``."""

    def __init__(self, objectives: list[int]) -> None:
        self.objectives = objectives
        super().__init__(
            f"gram: the gradients of objectives {objectives} are zero and zero_gradient is 'stop'; "
            "set zero_gradient: exclude to go on with the others"
        )


@dataclass(frozen=True)
class Solution:
    """Weights ``weights * exp(log_factor)`` over the objectives that take part.

    The factor is apart because ``1 / ||g||^p`` leaves the range of double precision for large p,
    while the ratios of the weights, all that two of the three scales need, do not.
    """

    weights: Tensor  # [K] float64
    log_factor: float = 0.0


@dataclass(kw_only=True)
class Aggregator(ABC):
    """Base of every method; called with a Gram matrix it returns the weights.

    Options, common to all methods:

    ``zero_gradient``: what to do when ``G_ii`` is exactly 0. ``exclude`` gives that objective weight
    0 and solves for the others; ``stop`` raises ``ZeroGradientError``.

    ``scale``: the length of the direction ``d = sum_i w_i g_i``. ``none`` keeps the weights of the
    method's formula. ``sum_to_one`` divides them by their sum. ``mean_norm`` multiplies them so that
    ``sum_i |w_i| ||g_i||`` is the mean of the ``||g_i||`` that take part: by the triangle inequality
    ``||d||`` is then at most an ordinary gradient's length, and equal to it when all gradients point
    the same way, whatever p is.
    """

    name: ClassVar[str]

    zero_gradient: ZeroGradient = "exclude"
    scale: Scale = "none"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):  # a user's own need not have one
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        require_choice("zero_gradient", self.zero_gradient, get_args(ZeroGradient))
        require_choice("scale", self.scale, get_args(Scale))

    @abstractmethod
    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        """The method's formula.

        ``gram`` is float64 [K, K], finite, with a positive diagonal, and belongs to the objectives
        ``active`` (K ascending indices); methods with one parameter per objective pick theirs by it.
        """

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        """The options in use that hold one number per objective, by name; their lengths are checked."""
        return {}

    def __call__(self, gram: Tensor) -> Tensor:
        """Weights [M] float64 on the CPU for ``gram`` [M, M].

        All weights are 0 where nothing is left to combine: every gradient is zero, or every weight
        of ``weighted_sum`` that is not 0 belongs to a zero gradient.

        Raises ``NonFiniteGramError`` or ``ZeroGradientError`` (both ``ValueError``), and
        ``ValueError`` for a matrix that is not square, a negative diagonal, options of another number
        of objectives, or weights outside double precision (only possible with ``scale: none``).
        """
        gram = gram.detach().to("cpu", torch.float64)
        check_gram(gram)
        self._check_lengths(gram.shape[0])
        excluded = zero_objectives(gram)
        if excluded and self.zero_gradient == "stop":
            raise ZeroGradientError(excluded)
        weights = torch.zeros(gram.shape[0], dtype=torch.float64)
        active = [i for i in range(gram.shape[0]) if i not in excluded]
        if active:
            index = torch.tensor(active)
            active_gram = gram[index][:, index]
            weights[index] = self._scaled(self.solve(active_gram, active), active_gram.diagonal().sqrt())
        return weights

    def excluded(self, gram: Tensor) -> list[int]:
        """Indices of the objectives that take no part because their gradient is exactly zero."""
        return zero_objectives(gram)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; empty for a method without memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``. Raises ``ValueError`` for the state of another method."""
        if state:
            raise ValueError(f"aggregation {self.name}: found state {sorted(state)}, accepted: none")

    def _check_lengths(self, count: int) -> None:
        for option, numbers in self.per_objective().items():
            if len(numbers) != count:
                accepted = f"one for each of the {count} objectives"
                raise ValueError(f"{option}: found {len(numbers)} numbers, accepted: {accepted}")

    def _scaled(self, solution: Solution, norms: Tensor) -> Tensor:
        weights = solution.weights
        if not bool(weights.any()):
            return weights
        log_factor = torch.tensor(solution.log_factor, dtype=torch.float64)
        scaled = scaled_weights(self.scale, weights, log_factor, norms, torch.tensor(len(norms)))
        if not bool(scaled.isfinite().all()) or not bool(scaled.any()):
            hint = "choose another scale"
            if self.scale == "none":
                hint = "choose scale: sum_to_one or mean_norm"
            raise ValueError(
                f"scale: found {self.scale!r}, with which {self.name} gives the weights {scaled.tolist()} "
                f"for gradients of norm {norms.tolist()}; {hint}"
            )
        return scaled


def scaled_weights(scale: Scale, weights: Tensor, log_factor: Tensor, norms: Tensor, count: Tensor) -> Tensor:
    """The option ``scale``, on any device; ``weights`` [K] not all 0, ``count`` of ``norms`` [K] not 0."""
    if scale == "none":
        return weights * log_factor.exp()
    if scale == "sum_to_one":
        return weights / weights.sum()
    return weights * (norms.sum() / count / (weights.abs() * norms).sum())


def check_gram(gram: Tensor) -> None:
    """Raise ``ValueError`` unless ``gram`` can be a finite Gram matrix."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram: found shape {list(gram.shape)}, accepted: [M, M] with M >= 1")
    finite = gram.isfinite()
    if not bool(finite.all()):
        # A NaN in g_i fills row and column i, so the diagonal alone says whose gradient it is.
        at_fault = ~finite.diagonal()
        if not bool(at_fault.any()):
            at_fault = ~finite.all(dim=1)
        raise NonFiniteGramError(at_fault.nonzero().flatten().tolist())
    if bool((gram.diagonal() < 0).any()):
        raise ValueError(
            f"gram: found the diagonal {gram.diagonal().tolist()}, accepted: squared norms, >= 0"
        )


def zero_objectives(gram: Tensor) -> list[int]:
    """Indices with ``G_ii`` exactly 0."""
    indices: list[int] = (gram.diagonal() == 0).nonzero().flatten().tolist()
    return indices


def cosine_matrix(gram: Tensor) -> Tensor:
    """``G_ij / (||g_i|| ||g_j||)`` with an exact unit diagonal; 0 where a gradient is zero."""
    norms = gram.diagonal().sqrt()
    safe = torch.where(norms == 0, torch.ones_like(norms), norms)
    # One division after the other: the product of two tiny norms would underflow.
    cosines = gram / safe[:, None] / safe[None, :]
    cosines.diagonal().copy_(torch.where(norms == 0, norms, norms / safe))
    return cosines


def require_choice(option: str, value: object, accepted: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{option}: found {value!r}, accepted: {', '.join(accepted)}")


def require_bool(option: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{option}: found {value!r}, accepted: true, false")


def is_number(value: object) -> bool:
    """A finite int or float; bool and text are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) != float("inf") and value == value
