"""What every aggregation method shares: its contract, its two common options, its checks.

A method turns the Gram matrix ``G_ij = <g_i, g_j>`` of the M objective gradients into weights
``w``, and the training engine then writes ``sum_i w_i g_i``. A method sees this small matrix alone, never
anything of the model's size. It may remember earlier steps: ``commit`` tells it which ones the optimizer
took. Asking for weights changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from gapo_mega.ops import Aggregated, AggregationMethod, Status, beyond_range

# Again under these names: users' own methods import them from here.
from gapo_mega.option_checks import is_number as is_number
from gapo_mega.option_checks import require_bool as require_bool
from gapo_mega.option_checks import require_choice as require_choice

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
class TensorSolution:
    """A formula's weights ``weights * exp(log_factor)``, on the Gram matrix's device.

    The factor is kept apart because ``1 / ||g||^p`` leaves the range of double precision for large p.
    The ratios of the weights do not, and two of the three scales need nothing else.
    """

    weights: Tensor  # [M] float64, 0 where an objective takes no part
    log_factor: Tensor  # [] float64
    status: Tensor  # [1] int32, a Status: OK, or NOT_CONVERGED where the formula found none


@dataclass(kw_only=True)
class Aggregator(AggregationMethod):
    """Base of every method; called with a Gram matrix [M, M] it returns the weights [M].

    All weights are 0 where nothing is left to combine: every gradient is zero, or every weight
    of ``weighted_sum`` that is not 0 belongs to a zero gradient.

    The call raises ``NonFiniteGramError`` or ``ZeroGradientError`` (both ``ValueError``), and
    ``ValueError`` for a matrix that is not square, a negative diagonal, options for another number
    of objectives, a matrix that the formula cannot solve, or weights outside float32, in which gradients
    are combined.

    Options, common to all methods:

    ``zero_gradient``: what to do when ``G_ii`` is exactly 0. ``exclude`` gives that objective weight
    0 and solves for the others; ``stop`` raises ``ZeroGradientError``.

    ``scale``: the length of the direction ``d = sum_i w_i g_i``. ``none`` keeps the weights of the
    method's formula. ``sum_to_one`` divides them by their sum. ``mean_norm`` multiplies them so that
    ``sum_i |w_i| ||g_i||`` is the mean of the ``||g_i||`` that take part: by the triangle inequality
    ``||d||`` is then at most an ordinary gradient's length, and equal to it when all gradients point
    the same way, whatever p is.

    Memory: a call only reads what a method remembers. ``commit`` writes it, from the Gram matrix and the
    weights of a step that the optimizer took, so skipped minibatches and failures leave no trace.
    ``state_dict`` holds what was committed.
    """

    name: ClassVar[str]
    # How the audit shows the method: whether without being asked for it, the options to ask it with beside a
    # run's own (none: the defaults), those that its label always names, and the one that, left out, gives
    # every objective the same number.
    in_every_audit: ClassVar[bool] = True
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    always_shown: ClassVar[tuple[str, ...]] = ()
    equal_when_left_out: ClassVar[str | None] = None
    # Whether the weights permute with the objectives. Not where the formula takes them in an order.
    symmetric: ClassVar[bool] = True

    zero_gradient: ZeroGradient = "exclude"
    scale: Scale = "none"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):  # a user's own class need not have one
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        require_choice("zero_gradient", self.zero_gradient, get_args(ZeroGradient))
        require_choice("scale", self.scale, get_args(Scale))

    @abstractmethod
    def solution(self, gram: Tensor, active: Tensor) -> TensorSolution:
        """Apply the method's formula to ``gram``, float64 [M, M], on its device.

        ``HostMethod`` and ``DeviceMethod`` implement this; it reads what the method remembers, and changes
        nothing. ``active`` [M] is true where ``G_ii`` is positive. Nobody has checked the values of ``gram``
        yet: the caller discards the result for an invalid matrix, so this must not raise.
        """

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        """Options in use with one number per objective, by name; ``weigh`` checks their lengths."""
        return {}

    def weigh(self, gram: Tensor) -> Aggregated:
        """Solve, scale and check, all on the device of ``gram``; only ``solution`` may wait for it."""
        self._check(gram)
        diagonal = gram.diagonal()
        active = diagonal > 0
        solution = self.solution(gram, active)
        proposed = scaled_weights(
            self.scale, solution.weights, solution.log_factor, diagonal.sqrt(), active.sum()
        )
        # The formula's weights that scaling made infinite, NaN or 0 in float64; ``Aggregated.of`` asks fp32.
        lost = ~proposed.isfinite() | ((proposed == 0) & (solution.weights != 0))
        nothing = ~solution.weights.any()
        status = solution.status.masked_fill(lost.any() & ~nothing, int(Status.OUT_OF_RANGE))
        fault = self._fault(gram)
        return Aggregated.of(
            gram,
            torch.where(nothing, torch.zeros_like(proposed), proposed),
            torch.where(fault != Status.OK, fault, status),
        )

    def error(self, found: Aggregated) -> ValueError:
        """The error for a status other than OK: ``NonFiniteGramError``, ``ZeroGradientError`` or its base."""
        gram = found.gram.cpu()
        diagonal = gram.diagonal()
        status = Status(int(found.status))
        if status == Status.NOT_FINITE:
            return NonFiniteGramError(nonfinite_objectives(gram))
        if status == Status.NEGATIVE_DIAGONAL:
            return ValueError(f"gram: found the diagonal {diagonal.tolist()}, accepted: squared norms, >= 0")
        if status == Status.ZERO_GRADIENT:
            return ZeroGradientError(zero_objectives(gram))
        if status == Status.NOT_CONVERGED:
            return ValueError(
                f"gram: found {gram.tolist()}, for which {self.name} finds no weights; "
                "accepted: a positive semidefinite matrix"
            )
        assert status == Status.OUT_OF_RANGE
        hint = {
            "none": "choose scale: sum_to_one or mean_norm",
            "sum_to_one": "choose scale: mean_norm",
            "mean_norm": "choose another method, or options that weigh such gradients more alike",
        }[self.scale]
        return ValueError(
            f"scale: found {self.scale!r}, with which {self.name} gives {beyond_range(found)}; {hint}"
        )

    @property
    def looks_at_scores(self) -> bool:
        """Whether weights depend on what ``observe`` is told, which the log of gradients does not hold."""
        return False

    def begin(self, means_M: Tensor, spreads_M: Tensor) -> None:
        """Do nothing: most methods look at gradients alone.

        Called once before the first rollout of a run that has held-out prompts, on every rank with the same
        numbers: those of ``observe``, over the held-out answers before training.
        """

    def observe(self, means_M: Tensor, spreads_M: Tensor) -> None:
        """Do nothing: most methods look at gradients alone.

        Called once after every rollout, before its updates, on every rank with the same numbers: the means
        and standard deviations of each objective's scores over all samples, [M]. A method that keeps them has
        them in its ``state_dict``.
        """

    def commit(self, found: Aggregated) -> None:
        """Do nothing: a method without memory has nothing to keep."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: the memory as last committed, empty for a method without one."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``. Raises ``ValueError`` for the state of another method."""
        if state:
            raise ValueError(f"aggregation {self.name}: found state {sorted(state)}, accepted: none")

    def _check(self, gram: Tensor) -> None:
        """Raise ``ValueError`` for what the host can tell without reading the matrix."""
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
            raise ValueError(f"gram: found shape {list(gram.shape)}, accepted: [M, M] with M >= 1")
        count = gram.shape[0]
        for option, numbers in self.per_objective().items():
            if len(numbers) != count:
                accepted = f"one for each of the {count} objectives"
                raise ValueError(f"{option}: found {len(numbers)} numbers, accepted: {accepted}")

    def _fault(self, gram: Tensor) -> Tensor:
        """Why ``gram`` [M, M] can have no weights, as a ``Status`` int32 [1] on its device; else OK."""
        diagonal = gram.diagonal()
        # Where several hold, the first one here is reported.
        faults = [
            (~gram.isfinite().all(), Status.NOT_FINITE),
            ((diagonal < 0).any(), Status.NEGATIVE_DIAGONAL),
        ]
        if self.zero_gradient == "stop":
            faults.append(((diagonal == 0).any(), Status.ZERO_GRADIENT))
        status = torch.zeros(1, dtype=torch.int32, device=gram.device)
        for holds, fault in reversed(faults):
            status.masked_fill_(holds, int(fault))
        return status


def scaled_weights(scale: Scale, weights: Tensor, log_factor: Tensor, norms: Tensor, count: Tensor) -> Tensor:
    """Apply ``scale``, on any device; ``weights`` [K] are not all 0, ``count`` of ``norms`` [K] are not 0."""
    if scale == "none":
        return weights * log_factor.exp()
    # Only the ratios count from here. A power of two keeps the sums in range and changes no digit.
    weights = torch.ldexp(weights, -torch.frexp(weights.abs().max()).exponent)
    if scale == "sum_to_one":
        return weights / weights.sum()
    return weights * (norms.sum() / count / (weights.abs() * norms).sum())


def nonfinite_objectives(gram: Tensor) -> list[int]:
    """Indices of the objectives whose gradients make ``gram`` NaN or Inf."""
    # A NaN in g_i fills row and column i, so the diagonal alone says whose gradient it is.
    finite = gram.isfinite()
    at_fault = ~finite.diagonal()
    if not bool(at_fault.any()):
        at_fault = ~finite.all(dim=1)
    indices: list[int] = at_fault.nonzero().flatten().tolist()
    return indices


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
