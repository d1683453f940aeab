"""Data that travels between the parts of a training step.

Shape legend, used as suffixes everywhere: B sequences, T token positions, M objectives,
N local parameters, V vocabulary. Tensors named ``x_BT`` have shape ``[B, T]``.

Sequences are *right* padded: prompt, response (its end-of-sequence token included when it was
sampled), padding. ``logprobs_BT[:, t]`` is the log-probability of ``tokens_BT[:, t]`` given the
tokens before it; it is 0 outside the response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Message = Mapping[str, str]  # role and content


@dataclass(frozen=True)
class Prompt:
    """One prompt: what the user wrote, and the token ids that the policy reads."""

    index: int
    text: str  # the last message of the user
    token_ids: tuple[int, ...] = ()
    # The whole conversation, without the system message that ``data.system_prompt`` gives to the policy;
    # empty where it is one message of the user, ``text``.
    messages: tuple[Message, ...] = ()

    def answered(self, response: str) -> list[Message]:
        """The conversation with ``response`` as the assistant's last message."""
        asked = self.messages or ({"role": "user", "content": self.text},)
        return [*asked, {"role": "assistant", "content": response}]


@dataclass(frozen=True)
class Generation:
    """What a generator returns for a list of token-id prompts (same order, CPU tensors)."""

    tokens_BT: Tensor  # int64, right padded with the pad id
    prompt_lengths_B: Tensor  # int64
    response_mask_BT: Tensor  # bool, True on response tokens (end-of-sequence included)
    logprobs_BT: Tensor  # float32, raw softmax (temperature 1, no penalty), 0 off the response
    finished_B: Tensor  # bool, True where an end-of-sequence token was produced


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

    @property
    def batch_size(self) -> int:
        return int(self.tokens_BT.shape[0])


@dataclass(frozen=True)
class TokenBatch:
    """Tokens, and which of them count: all that a forward pass reads. One row per sequence.

    The mask is true on the tokens of the response or, in supervised work, on those that are learned or at
    which a score is taken.
    """

    tokens_BT: Tensor  # int64, right padded
    response_mask_BT: Tensor  # bool

    @property
    def batch_size(self) -> int:
        return int(self.tokens_BT.shape[0])

    def select(self: AnyBatch, index_B: Tensor) -> AnyBatch:
        """The rows ``index_B`` (int64)."""
        return self._each(lambda tensor, dim: tensor.index_select(dim, index_B))

    def split(self: AnyBatch, size: int) -> list[AnyBatch]:
        """Consecutive pieces of at most ``size`` rows."""
        rows = torch.arange(self.batch_size)
        return [self.select(rows[i : i + size]) for i in range(0, self.batch_size, size)]

    def to(self: AnyBatch, device: torch.device) -> AnyBatch:
        """The batch on ``device``."""
        return self._each(lambda tensor, _: tensor.to(device))

    def _each(self: AnyBatch, change: Callable[[Tensor, int], Tensor]) -> AnyBatch:
        """Apply ``change`` to every tensor that is there, with the dimension of its rows."""
        changes: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                changes[field.name] = change(value, 1 if "_MB" in field.name else 0)
        return replace(self, **changes)


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
    # The KL part of the token rewards; None: what these have beyond the scores.
    kl_rewards_BT: Tensor | None = None

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
