"""What every scalarizer shares: its contract and its checks.

A scalarizer sits between scores and advantages. It sees the scores of the whole batch, of all data ranks,
and gives one number a response, so that an update has one gradient and the cost of one objective.
It may remember earlier batches: ``commit`` tells it which ones were trained on. Asking changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from gapo_mega.option_checks import require_bool

Gives = Literal["rewards", "advantages"]


@dataclass(kw_only=True)
class Scalarizer(ABC):
    """Base of every scalarizer; options are the fields of the dataclass that implements it.

    ``gives`` says what the numbers are. ``rewards``: the run's advantage estimator takes them for the scores
    of its only objective. ``advantages``: they are used as they are, the same for all tokens of a response;
    the KL reward's deviation from the mean of the prompt's other samples is added.

    Memory: a call reads what the scalarizer remembers, and the batch. ``commit`` writes it, once for every
    batch, on every rank with the same numbers. ``state_dict`` holds what was committed, as plain numbers.
    """

    name: ClassVar[str]
    gives: ClassVar[Gives]
    least_samples: ClassVar[int] = 1  # fewest samples of a prompt (``rollout.samples_per_prompt``)

    _names: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):  # a user's own class need not have one
            cls.name = cls.__name__

    @abstractmethod
    def __call__(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        """One finite number a response, float64 [B].

        Args:
            scores_MB: the objectives' scores, higher is better, of the whole batch.
            group_B: int64; samples of one prompt share a number.
            lengths_B: int64; tokens of the response.
        """

    def prepare(self, names: Sequence[str]) -> None:
        """Take the objectives' names, once, before the first batch.

        Raises ``ValueError`` for options that do not fit them.
        """
        self._names = list(names)
        for option, numbers in self.per_objective().items():
            if len(numbers) != len(names):
                accepted = f"one for each of the {len(names)} objectives"
                raise ValueError(f"{option}: found {len(numbers)} numbers, accepted: {accepted}")

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        """Options in use with one number per objective, by name; ``prepare`` checks their lengths."""
        return {}

    def begin(self, means_M: Tensor, spreads_M: Tensor) -> None:
        """Do nothing: most scalarizers look at batches alone.

        Called once before the first batch of a run that has held-out prompts, on every rank with the same
        numbers: means and standard deviations of the objectives' scores, float64 [M], over the held-out
        answers before training.
        """
        return None

    def commit(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> None:
        """Remember this batch. A scalarizer without memory has nothing to keep."""
        return None

    def facts(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> dict[str, float]:
        """What the log takes of this batch, by the log's names. Asked before ``commit``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: the memory as last committed, empty without one."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``. Raises ``ValueError`` for the state of another scalarizer."""
        if set(state) != set(self.state_dict()):
            accepted = ", ".join(sorted(self.state_dict())) or "none"
            raise ValueError(f"scalarization {self.name}: found state {sorted(state)}, accepted: {accepted}")
        self.restore(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the memory from ``state``, which has the keys of ``state_dict``."""
        return None


@dataclass(kw_only=True)
class Weighted(Scalarizer):
    """Rewards that are a sum of the scores, ``sum_k c_k r_k``, with the same coefficients for a whole batch.

    An estimator with a critic values every objective apart: its advantages are summed with the
    coefficients, ``A = sum_k c_k A_k``, as Safe RLHF does.

    ``safe``: true measures the gradient of every objective and takes, of all directions that hurt no
    objective to first order, the nearest to ``sum_k c_k g_k`` (``safe.SafeWeights``).
    """

    gives: ClassVar[Gives] = "rewards"

    safe: bool = False

    def __post_init__(self) -> None:
        require_bool("safe", self.safe)

    @abstractmethod
    def coefficients(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        """``c`` for this batch, float64 [M]."""

    def __call__(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        return self.coefficients(scores_MB, group_B, lengths_B).double() @ scores_MB.double()

    def facts(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> dict[str, float]:
        """The coefficients, as ``reward_weight/NAME``."""
        found = self.coefficients(scores_MB, group_B, lengths_B).tolist()
        return {f"reward_weight/{name}": c for name, c in zip(self._names, found, strict=True)}
