"""What an objective is, and the checks that every kind of objective gets for free."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

from gapo_mega.config import ObjectiveConfig
from gapo_mega.types import Prompt, lone_surrogate


class Objective(Protocol):
    """What the rest of the package sees: a name, and scores of responses. Higher is better."""

    name: str
    wanted_model: ScoreModelRequest | None

    def attach(self, scorer: TokenScorer) -> None:
        """Take the score model that ``wanted_model`` asks for."""
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One finite score per pair; the two lists have the same length."""
        ...


@dataclass(frozen=True)
class ScoreModelRequest:
    """The score model that an objective asks the engine for, and how to run it."""

    path: str  # Hugging Face directory or hub name, or a checkpoint
    dtype: Literal["fp32", "bf16"]
    micro_batch_size: int
    offload: bool


# What Python can iterate over, and is no list of scores.
_NO_SCORES = (str, bytes, bytearray, memoryview, Set, Mapping)

# Token ids of conversations -> their scores, in order. Collective over the ranks of a replica.
TokenScorer = Callable[[Sequence[Sequence[int]]], list[float]]


class ObjectiveKind(ABC):
    """Base of every kind of objective. A kind says how to ``evaluate``; the checks are here."""

    kind: ClassVar[str]  # what ``objectives[].kind`` in the configuration calls it
    # The score model that ``evaluate`` needs of the engine, which runs it on all ranks of a replica. None:
    # ``evaluate`` runs on the first rank alone, and needs nothing of the engine.
    wanted_model: ScoreModelRequest | None = None

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.name: str = config.name

    def attach(self, scorer: TokenScorer) -> None:
        """Take the score model that ``wanted_model`` asks for."""
        raise AssertionError(f"objective {self.name!r} asks for no score model")

    @abstractmethod
    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> object:
        """Raw scores: a sequence, array or tensor of numbers, one per pair."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Checked scores, clipped to ``[-clip, clip]`` where the configuration says so.

        Raises ``ValueError`` naming the objective (and the index and value at fault) unless there is
        exactly one finite number per pair, and for text that UTF-8 cannot hold.
        """
        if not responses:
            return []
        self._check_texts(prompts, responses)
        scores = self._numbers(self.evaluate(prompts, responses), len(responses))
        clip = self.config.clip
        return scores if clip is None else [max(-clip, min(clip, score)) for score in scores]

    def _check_texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
        """Raise ``ValueError`` for lone surrogates: no request, tokenizer or file can hold them."""
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            asked = [text for message in prompt.messages for text in message.values()]
            texts = [("response", response), *(("prompt of response", t) for t in (prompt.text, *asked))]
            for what, text in texts:
                place = lone_surrogate(text)
                if place is not None:
                    raise self._error(
                        f"found {text[place]!r} at character {place} of the {what} {index}, accepted: text "
                        "without lone surrogates"
                    )

    def _numbers(self, result: object, count: int) -> list[float]:
        values = result.tolist() if isinstance(result, Tensor | np.ndarray) else result
        # A set has no order, a mapping would give its keys, and bytes their codes.
        if isinstance(values, _NO_SCORES) or not isinstance(values, Iterable):
            kind = type(result).__name__
            raise self._error(f"found a result of type {kind}, accepted: a list of scores")
        items = list(values)
        if len(items) != count:
            raise self._error(f"found {len(items)} scores, accepted: {count}, one for each response")
        return [self._number(index, item) for index, item in enumerate(items)]

    def _number(self, index: int, item: Any) -> float:
        try:
            number = math.nan if isinstance(item, str | bytes) else float(item)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self._error(f"found the score {item!r} for response {index}, accepted: a finite number")
        return number

    def _error(self, what: str) -> ValueError:
        return ValueError(f"objective {self.name!r}: {what}")
