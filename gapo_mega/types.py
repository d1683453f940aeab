"""Data that travels between the parts of a training step.

Shape legend, used as suffixes everywhere: B sequences, T token positions, M objectives,
N local parameters, V vocabulary. Tensors named ``x_BT`` have shape ``[B, T]``.

Sequences are *right* padded: prompt, response (its end-of-sequence token included when it was
sampled), padding. ``logprobs_BT[:, t]`` is the log-probability of ``tokens_BT[:, t]`` given the
tokens before it; it is 0 outside the response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Message = Mapping[str, str]  # role and content
# Called after every token of a generation, on every rank: numbers of the prompts whose responses go on, and
# the new token of each. What it raises, on all ranks alike, ends the generation, and harms no later one.
TokenWatcher = Callable[[Sequence[int], Sequence[int]], None]


def well_formed(text: str) -> str:
    """``text`` with U+FFFD for every lone surrogate: those have no UTF-8, so that no file can hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def lone_surrogate(text: str) -> int | None:
    """The place of the first character that has no UTF-8, from 0; None where there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


@dataclass(frozen=True)
class Prompt:
    """One prompt: what the user wrote, and the token ids that the policy reads."""

    index: int
    text: str  # the last message of the user
    token_ids: tuple[int, ...] = ()
    # The whole conversation, without the system message that ``data.system_prompt`` gives to the policy;
    # empty where it is one message of the user, ``text``.
    messages: tuple[Message, ...] = ()
    # The row's other columns that objectives ask for; null where the row has no value.
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def answered(self, response: str) -> list[Message]:
        """The conversation with ``response`` as the assistant's last message."""
        asked = self.messages or ({"role": "user", "content": self.text},)
        return [*asked, {"role": "assistant", "content": response}]


@dataclass(frozen=True)
class ResponseFacts:
    """What is known of responses besides their text, one of each a response."""

    token_counts: Sequence[int]  # the end-of-sequence token included
    finished: Sequence[bool]  # whether it was produced


@dataclass(frozen=True)
class KeptTokens:
    """The tokens that top-k and top-p left to draw from, at every position of a batch: a ragged array."""

    counts_BT: Tensor  # int64; 0 off the response
    tokens_K: Tensor  # int32, of all positions, row after row

    def select(self, index_B: Tensor) -> KeptTokens:
        """The rows ``index_B`` (int64)."""
        rows = torch.split(self.tokens_K, self.counts_BT.sum(dim=1).tolist())
        chosen = [rows[i] for i in index_B.tolist()]
        return KeptTokens(
            self.counts_BT.index_select(0, index_B),
            torch.cat(chosen) if chosen else self.tokens_K[:0],
        )

    def where(self, mask_BT: Tensor) -> KeptTokens:
        """The same at the positions in ``mask_BT``, nothing at others."""
        kept_K = mask_BT.flatten().repeat_interleave(self.counts_BT.flatten())
        return KeptTokens(self.counts_BT * mask_BT, self.tokens_K[kept_K])

    def to(self, device: torch.device) -> KeptTokens:
        """The same on ``device``."""
        return KeptTokens(self.counts_BT.to(device), self.tokens_K.to(device))


@dataclass(frozen=True)
class Generation:
    """What a generator returns for a list of token-id prompts (same order, CPU tensors).

    ``logprobs_BT`` is of the distribution that the token was drawn from: after repetition penalty,
    temperature, top-k and top-p. Greedy responses (temperature 0) have those of temperature 1.
    """

    tokens_BT: Tensor  # int64, right padded with the pad id
    prompt_lengths_B: Tensor  # int64
    response_mask_BT: Tensor  # bool, True on response tokens (end-of-sequence included)
    logprobs_BT: Tensor  # float32, 0 off the response
    finished_B: Tensor  # bool, True where an end-of-sequence token was produced
    kept: KeptTokens | None = None  # with top-k or top-p
    # int64: the engine's ``changes`` when the weights were taken that drew a response; None: not said.
    versions_B: Tensor | None = None


@dataclass(frozen=True)
class Rollout:
    """Sampled responses of this data-parallel rank, with their decoded text."""

    prompts: list[Prompt]
    responses: list[str]
    group_B: Tensor  # int64; samples of one prompt share a number
    tokens_BT: Tensor
    prompt_lengths_B: Tensor
    response_mask_BT: Tensor
    logprobs_BT: Tensor
    finished_B: Tensor
    kept: KeptTokens | None = None
    versions_B: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return int(self.tokens_BT.shape[0])

    @property
    def facts(self) -> ResponseFacts:
        """What objectives may read of the responses besides their text."""
        return ResponseFacts(self.response_mask_BT.sum(dim=1).tolist(), self.finished_B.tolist())

    @property
    def batch(self) -> TokenBatch:
        """What a forward pass needs of it."""
        return TokenBatch(self.tokens_BT, self.response_mask_BT, kept=self.kept)


@dataclass(frozen=True)
class TokenBatch:
    """Tokens, and which of them count: all that a forward pass reads. One row per sequence.

    The mask is true on the tokens of the response or, in supervised work, on those that are learned or at
    which a score is taken. With ``kept`` the log-probability of a token is that among the kept ones. With
    ``packed_width`` a model gets all sequences one behind the other, without their padding, as one row of so
    many tokens; every tensor here has one row per sequence all the same.
    """

    tokens_BT: Tensor  # int64, right padded
    response_mask_BT: Tensor  # bool
    kept: KeptTokens | None = field(default=None, kw_only=True)
    packed_width: int | None = field(default=None, kw_only=True)

    @property
    def batch_size(self) -> int:
        return int(self.tokens_BT.shape[0])

    def select(self: AnyBatch, index_B: Tensor) -> AnyBatch:
        """The rows ``index_B`` (int64)."""
        kept = None if self.kept is None else self.kept.select(index_B)
        return self._each(lambda tensor, dim: tensor.index_select(dim, index_B), kept)

    def split(self: AnyBatch, size: int) -> list[AnyBatch]:
        """Consecutive pieces of at most ``size`` rows."""
        rows = torch.arange(self.batch_size)
        return [self.select(rows[i : i + size]) for i in range(0, self.batch_size, size)]

    @property
    def lengths_B(self) -> Tensor:
        """int64: columns up to the last that counts, beyond which no token has influence; at least 1."""
        column_T = torch.arange(1, self.tokens_BT.shape[1] + 1, device=self.tokens_BT.device)
        return (self.response_mask_BT * column_T).amax(dim=1).clamp(min=1)

    def cut(self: AnyBatch, columns: int) -> AnyBatch:
        """The first ``columns`` columns; no later one may count."""
        assert not self.response_mask_BT[:, columns:].any(), columns
        kept = None if self.kept is None else replace(self.kept, counts_BT=self.kept.counts_BT[:, :columns])
        return self._each(lambda tensor, _: tensor[..., :columns], kept, lambda name: name.endswith("T"))

    def to(self: AnyBatch, device: torch.device) -> AnyBatch:
        """The batch on ``device``."""
        kept = None if self.kept is None else self.kept.to(device)
        return self._each(lambda tensor, _: tensor.to(device), kept)

    def _each(
        self: AnyBatch,
        change: Callable[[Tensor, int], Tensor],
        kept: KeptTokens | None,
        where: Callable[[str], bool] = lambda name: True,
    ) -> AnyBatch:
        """Apply ``change`` to every tensor that is there, with the dimension of its rows; take ``kept``.

        ``where``: of a tensor's name, whose suffix tells its dimensions.
        """
        changes: dict[str, Any] = {}
        for own in fields(self):
            value = getattr(self, own.name)
            if isinstance(value, Tensor) and where(own.name):
                changes[own.name] = change(value, 1 if "_MB" in own.name else 0)
        return replace(self, **changes, kept=kept)


AnyBatch = TypeVar("AnyBatch", bound=TokenBatch)


@dataclass(frozen=True)
class Experience(TokenBatch):
    """A scored rollout: all that the losses need. Tensors only, one row per sequence."""

    group_B: Tensor
    old_logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    scores_MB: Tensor  # raw objective scores, higher is better
    token_rewards_MBT: Tensor  # score at the last response token plus beta * KL reward per token
    values_MBT: Tensor | None = None  # critic before the update; None when critic-free
    advantages_MBT: Tensor | None = None
    returns_MBT: Tensor | None = None
    greedy_scores_MB: Tensor | None = None  # of the greedy response to each row's prompt, for ReMax
    # The KL part of the token rewards; None: what these have beyond the scores.
    kl_rewards_BT: Tensor | None = None
    # Weights of response tokens that correct for a rollout that was drawn from another distribution, already
    # a factor of the advantages; None: 1 everywhere.
    correction_BT: Tensor | None = None

    def minibatches(self, count: int, generator: torch.Generator) -> Iterator[Experience]:
        """``count`` random disjoint minibatches of equal size that together cover every row."""
        if self.batch_size % count:
            raise ValueError(
                f"algorithm.minibatches: found {count}, which does not divide the "
                f"{self.batch_size} sequences of a data-parallel rank"
            )
        order = torch.randperm(self.batch_size, generator=generator)
        for rows in order.chunk(count):
            yield self.select(rows)


@dataclass(frozen=True)
class PolicyFacts:
    """How far the policy was, before an update, from the one that sampled; over all response tokens."""

    clipped: dict[str, list[float]]  # by the name of a loss's bound, per objective: share of tokens held back
    kl: float  # estimate of KL(old || new) per token, nats: mean of rho - 1 - log rho
    ratio_min: float  # of a token
    ratio_max: float
    entropy_estimate: float  # mean of -log pi of the sampled tokens, nats
    entropy: float | None = None  # mean over the sampled positions, where it was asked for


@dataclass(frozen=True)
class SupervisedUpdate:
    """What one optimizer step measured over all data-parallel ranks; the same on every rank."""

    loss: float  # mean over pairs, or over the tokens to learn
    right: float  # share of pairs whose chosen row has the higher score, ties half; 0 for chats
    gradient_norm: float  # before clipping
    learning_rate: float
    skipped: bool  # True: the gradient was not finite, parameters untouched


class BackgroundSave(Protocol):
    """A checkpoint whose files are being written while training goes on. All methods are collective."""

    def is_done(self) -> bool:
        """Whether every rank has written its files, or has failed to. The same on every rank."""
        ...

    def wait(self, seconds: float) -> bool:
        """``is_done``, ``seconds`` from now at the latest."""
        ...

    def finish(self) -> Mapping[str, Mapping[str, Any]]:
        """Make one checkpoint of all ranks' files; return sizes and checksums of this rank's, by name.

        Raises ``OSError`` on every rank where one has not written its files.
        """
        ...


@dataclass(frozen=True)
class Layout:
    """The size of every parallel axis, and this process's rank along it."""

    world: int
    rank: int
    tensor: int
    pipeline: int
    data: int
    data_rank: int
    tensor_rank: int
    pipeline_rank: int
    in_step: bool = False  # data ranks share experts: they make the same calls, with equally many rows
    context: int = 1  # ranks that share every sequence
    context_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this is the first of the ranks that have the same sequences."""
        return self.tensor_rank == self.context_rank == self.pipeline_rank == 0

    @property
    def first_of_last_stage(self) -> int:
        """The number of the last stage's first rank among the ranks that have the same sequences."""
        return (self.pipeline - 1) * self.context * self.tensor
