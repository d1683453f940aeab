"""What the rest of the package sees of the training engines, and how it builds one.

``engine/megatron`` implements everything below over Megatron-core. Only the ``build_`` functions import it:
the import takes seconds, and a user should read about bad input before that. All methods are collective:
every rank of the world calls them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gapo_mega.config import RolloutConfig
from gapo_mega.models.score_head import ScoreHead
from gapo_mega.objectives.base import ScoreModelRequest, TokenScorer
from gapo_mega.ops import HostAggregator
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.planning.setups import AnsweringSetup
from gapo_mega.planning.setups import SupervisedSetup as SupervisedSetup
from gapo_mega.types import BackgroundSave as BackgroundSave
from gapo_mega.types import Experience, Generation, TokenBatch, TokenWatcher
from gapo_mega.types import Layout as Layout
from gapo_mega.types import PolicyFacts as PolicyFacts
from gapo_mega.types import SupervisedUpdate as SupervisedUpdate

# A method of gapo_mega.aggregation (any gapo_mega.ops.AggregationMethod): the engine asks it for weights once
# per step, on the Gram matrix's device, and calls its commit after the optimizer step. Or any function from
# the Gram matrix [M, M] float64 on the CPU to weights [M] float64.
Aggregator = HostAggregator

# (logprobs_BT, microbatch, objective index) -> *sum* over response tokens of the loss (a scalar
# with a graph), as a gapo_mega.losses.PolicyLoss returns it. The engine divides by the number of response
# tokens of the minibatch over all data ranks, or by what the ``normalization`` of a PolicyLoss says.
PolicyLossSum = Callable[[Tensor, Experience, int], Tensor]

# (values_BT of one objective, microbatch, objective index) -> *sum* over response tokens.
ValueLoss = Callable[[Tensor, Experience, int], Tensor]


@dataclass(frozen=True)
class GradientReport:
    """What one policy update measured; the same on every rank."""

    losses: list[float]  # per objective, the mean that the loss's normalization says
    gram: Tensor  # [M, M] float64, CPU
    weights: Tensor  # [M] float64, CPU
    gradient_norm: float  # Megatron's norm of the combined gradient, before clipping
    clip_factor: float  # 1 if nothing was clipped
    learning_rate: float
    skipped: bool = False  # True: there was no step to take, parameters untouched
    reason: str | None = None  # why it was skipped, in the aggregator's words, if that found no weights
    nonfinite: list[int] = field(default_factory=list)  # objectives with a non-finite gradient
    excluded: list[int] = field(default_factory=list)  # objectives with a zero gradient
    # <parameters before - after, g_k>: each objective's first-order gain from the change that the optimizer
    # made; None if the strategy does not measure it, NaN if it cannot be computed
    actual_change: list[float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # forward_backward, aggregate, optimizer
    # [M, M] float64, CPU: inner products of the gradients' running means, from which the weights follow;
    # None: they follow from ``gram``
    averaged_gram: Tensor | None = None
    # Tokens that a pass computed over those of prompts and responses: what padding to the longest of a
    # microbatch costs.
    padding: float = 1.0
    policy: PolicyFacts | None = None
    routers: dict[str, float] = field(default_factory=dict)  # of the losses of experts' routers, for the log


@dataclass(frozen=True)
class SamplingParameters:
    """How to sample tokens; ``temperature`` 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, rollout: RolloutConfig) -> SamplingParameters:
        """Those of a configuration's section."""
        cut, penalty = (rollout.top_k, rollout.top_p), rollout.repetition_penalty
        return cls(rollout.max_new_tokens, rollout.temperature, *cut, penalty)

    @property
    def cuts(self) -> bool:
        """Whether some tokens cannot be drawn, so that a generation says which can."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)


def generator_seed(seed: int) -> int:
    """A seed that torch's generators take, which have 64 bits; one of fewer than 63 bits stays as it is."""
    return seed if abs(seed) < 2**62 else seed % 2**62


class Generator(Protocol):
    """A rollout back end. ``generate`` is collective over the model-parallel ranks of a replica."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int,
        watch: TokenWatcher | None = None,
    ) -> Generation:  # fmt: skip
        """Responses for token-id prompts of different lengths. The same on every rank of a replica."""
        ...

    def update_weights(self) -> None:
        """Take over the policy's current parameters. In-process back ends share them and do nothing."""
        ...

    def rest(self) -> None:
        """Nothing is asked before the next ``update_weights``: let go of memory. May do nothing."""
        ...


class Ranks(Protocol):
    """Collectives over small CPU tensors and Python objects."""

    layout: Layout

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """All-reduce: the sum of a CPU tensor over the data-parallel ranks."""
        ...

    def gather_over_data(self, value: Any) -> list[Any]:
        """All-gather: the picklable values of all data-parallel ranks, in rank order."""
        ...

    def broadcast_in_replica(self, value: Any) -> Any:
        """Broadcast the value of the replica's first rank (tensor rank 0, pipeline rank 0)."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def close(self) -> None:
        """Leave the process groups."""
        ...


class RunEngine(Ranks, Protocol):
    """What every engine offers a run: saving and loading its state, and exporting the trained model."""

    @property
    def changes(self) -> int:
        """Grows before anything changes that ``save`` writes: an optimizer step, a ``load``."""
        ...

    def random_states(self) -> dict[str, Any]:
        """The states of all random-number generators of this process, as ``save`` writes them."""
        ...

    def restore_random_states(self, states: dict[str, Any]) -> None:
        """Set them back."""
        ...

    def is_finite(self) -> bool:
        """Whether every trained parameter of every rank is finite. Collective; the same on every rank."""
        ...

    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        """Save models, optimizers, schedules, random-number states and ``extra``, the run's own state."""
        ...

    def save_in_background(self, directory: Path, extra: dict[str, Any]) -> BackgroundSave:
        """``save`` the state as it is now; the files are written after this has returned."""
        ...

    def load(self, directory: Path) -> dict[str, Any]:
        """Restore what ``save`` wrote and return ``extra``."""
        ...

    def export_hf(self, directory: Path) -> None:
        """Write the trained model as a Hugging Face directory that transformers loads."""
        ...

    def export_adapter(self, directory: Path) -> None:
        """Write the trained model's adapters in PEFT's format. Replaces ``directory`` if it exists."""
        ...

    def gather_parameters(self) -> None:
        """Bring all ranks' parameters up to date. Collective.

        Needed before forward passes that not every data rank runs: with ``optimizer.overlap_param_gather``
        the first one after an update waits for those of the other data ranks.
        """
        ...


class Answering(Ranks, Protocol):
    """A policy that answers and is scored, and its reference."""

    @property
    def generator(self) -> Generator:
        """The rollout back end that samples from the current policy."""
        ...

    def logprobs(self, batch: TokenBatch, model: Literal["policy", "reference"]) -> Tensor:
        """Log-probabilities of the response tokens [B, T] float32, CPU, no graph; 0 elsewhere.

        Of the distribution that the run's sampling settings draw from: repetition penalty and temperature
        applied and, with ``batch.kept``, the kept tokens alone.
        """
        ...

    def score_model(self, request: ScoreModelRequest) -> TokenScorer:
        """The frozen score model that an objective requests, in the policy's layout.

        Raises ``ValueError`` if it is not a score model or does not fit the layout.
        """
        ...


class AnsweringEngine(Answering, Protocol):
    """Policies that answer and never learn, one after another."""

    def take(self, setup: AnsweringSetup) -> None:
        """Load these models in place of the earlier ones, in the same layout; score models stay."""
        ...

    def beside(self, setup: AnsweringSetup) -> AnsweringEngine:
        """Another engine in the same layout, with models of its own; closing one closes both."""
        ...


class Engine(RunEngine, Answering, Protocol):
    """Policy, reference and critic on this world of ranks."""

    def values(self, batch: TokenBatch) -> Tensor:
        """Critic values [M, B, T] float32, CPU: column t is the value *before* token t is sampled."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's whole tensors by Hugging Face names, on rank 0; all ranks iterate to the end."""
        ...

    def update_policy(
        self, minibatch: Experience, loss: PolicyLossSum, aggregator: Aggregator, *, audit: bool = False
    ) -> GradientReport:
        """One optimizer step on the aggregated gradient of the rows of the run's configuration.

        ``audit``: of its ``audited_rows`` instead. The minibatch has advantages for each of the rows.
        """
        ...

    def update_critic(self, minibatch: Experience, loss: ValueLoss) -> list[float]:
        """One optimizer step of every critic. Returns the value loss per model, the global token mean."""
        ...

    def peak_memory(self) -> int:
        """Peak bytes of the rank that has used most: device memory, or resident memory on the CPU."""
        ...


class BenchmarkEngine(Engine, Protocol):
    """What ``gapo-mega benchmark step`` also needs: switching the gradient strategy on the same models."""

    @property
    def device(self) -> torch.device:
        """The device of this rank's models."""
        ...

    def take_strategy(self, resolved: ResolvedRun) -> int:
        """Use the gradient strategy of ``resolved`` from now on. Returns bytes of its rows on this rank."""
        ...

    def resident(self) -> dict[str, int]:
        """Bytes of the policy's parameters, gradients and optimizer state on this rank, by its tensors."""
        ...

    def largest(self, value: int) -> int:
        """All-reduce: the maximum of all ranks' values."""
        ...


class SupervisedEngine(RunEngine, Protocol):
    """Supervised training of one model.

    A batch has tokens and a mask. For pairs, chosen and rejected rows alternate, and the mask marks the token
    of each row whose output is the score. For chats, the mask marks the tokens to learn.
    """

    def update(self, batch: TokenBatch) -> SupervisedUpdate:
        """One optimizer step on this data rank's rows."""
        ...

    def measure(self, batch: TokenBatch) -> Tensor:
        """``[B]`` float32 on the CPU for this data rank's rows: scores, or log-likelihoods of chats."""
        ...


def build_engine(
    resolved: ResolvedRun, *, pad_id: int, eos_ids: list[int], chat_template: str | None = None
) -> Engine:
    """Build the models of a training run and load them. ``pad_id``, ``eos_ids``: the policy tokenizer's.

    ``chat_template``: Jinja text to store with the trained model; None: the source's own.
    """
    from gapo_mega.engine.megatron.engine import MegatronEngine

    return MegatronEngine(resolved, pad_id=pad_id, eos_ids=eos_ids, chat_template=chat_template)


def build_benchmark_engine(resolved: ResolvedRun) -> BenchmarkEngine:
    """Like ``build_engine``, without a tokenizer: the benchmark generates nothing."""
    from gapo_mega.engine.megatron.engine import MegatronEngine

    return MegatronEngine(resolved, pad_id=0, eos_ids=[0])


def build_answering_engine(setup: AnsweringSetup) -> AnsweringEngine:
    """Build models that answer, without gradients and optimizers, and load them."""
    from gapo_mega.engine.megatron.answering import MegatronAnswers

    return MegatronAnswers(setup)


def build_pair_engine(
    setup: SupervisedSetup, *, head: ScoreHead | None, center: float, pad_id: int
) -> SupervisedEngine:
    """Build a score model that trains on preference pairs with the Bradley-Terry loss.

    ``head``: the source's score head; None for a language model. ``center``: weight of the squared mean of
    a pair's scores in the loss.
    """
    from gapo_mega.engine.megatron.supervised import PairEngine

    return PairEngine(setup, head=head, center=center, pad_id=pad_id)


def build_chat_engine(setup: SupervisedSetup) -> SupervisedEngine:
    """Build a language model that trains with the cross entropy of the marked tokens."""
    from gapo_mega.engine.megatron.supervised import ChatEngine

    return ChatEngine(setup)


def read_score_head(source: Path) -> ScoreHead | None:
    """The score head of a Hugging Face directory or Megatron checkpoint; None for a language model."""
    from gapo_mega.engine.megatron.checkpoint.weights import head_if_any

    return head_if_any(source)


class CheckpointConverter(Protocol):
    """Converts models between Hugging Face directories and the engine's checkpoints, tensor by tensor."""

    def to_checkpoint(
        self,
        source: Path,
        target: Path,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a Hugging Face directory as a checkpoint. Collective if torch.distributed is initialized.

        Stores the shards of ``tensor`` x ``pipeline`` ranks apart. ``dtype`` None: as in the source.
        Raises ``ValueError`` for a model or a target that it refuses.
        """
        ...

    def to_hf(
        self, source: Path, target: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> None:
        """Write the trained model of the checkpoint ``source`` as a Hugging Face directory.

        Raises ``ValueError`` if ``source`` is not complete or it cannot write ``target``.
        """
        ...


def start_process_group(backend: str) -> None:
    """Meet the other processes of the job; see ``gapo_mega/engine/process_group.py``."""
    from gapo_mega.engine import process_group

    process_group.start_process_group(backend)


def checkpoint_converter() -> CheckpointConverter:
    """The engine's converter, imported only here because Megatron takes seconds to load."""
    from gapo_mega.engine.megatron.checkpoint import convert

    return convert
