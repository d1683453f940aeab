"""What an objective is, and the checks that every kind of objective gets for free."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

from gapo_mega.config import ObjectiveConfig
from gapo_mega.credentials import revealed
from gapo_mega.option_checks import shown
from gapo_mega.stopping import StoppedWaiting
from gapo_mega.types import Prompt, ResponseFacts, lone_surrogate
from gapo_mega.user_code import place_of, reason_of


class Objective(Protocol):
    """What the rest of the package sees: a name, and scores of responses. Higher is better."""

    name: str
    wanted_model: ScoreModelRequest | None
    reads_facts: bool

    def attach(self, scorer: TokenScorer) -> None:
        """Take the score model that ``wanted_model`` asks for."""
        ...

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse, before the first response, a prompt whose columns it cannot use."""
        ...

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        """One finite score per pair; the lists have the same length. ``facts`` where they are known."""
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

_EXCERPT = 420  # characters of a score that an error shows

# Token ids of conversations -> their scores, in order. Collective over the ranks of a replica.
TokenScorer = Callable[[Sequence[Sequence[int]]], list[float]]


class ObjectiveError(ValueError):
    """What an objective refuses; begins with its name."""


class RewardFailed(ObjectiveError):
    """The user's code failed while it scored; names objective, file and line.

    Attributes:
        reason: what the code said, without the place.
        refused: whether it raised ``ValueError``, as for a response that it does not take; else asking again
            may help.
    """

    def __init__(self, text: str, reason: str = "", refused: bool = False) -> None:
        super().__init__(text)  # the only argument that pickle passes; it sets the others afterwards
        self.reason = reason
        self.refused = refused


class Outline:
    """An objective of a plan, whose model is not on this machine. It has a name and no scores."""

    reads_facts = False

    def __init__(self, name: str, wanted_model: ScoreModelRequest | None) -> None:
        self.name = name
        self.wanted_model = wanted_model

    def attach(self, scorer: TokenScorer) -> None:
        raise AssertionError(f"objective {self.name!r} is an outline for plans")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        raise AssertionError(f"objective {self.name!r} is an outline for plans")

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        raise AssertionError(f"objective {self.name!r} is an outline for plans")


class SharedCall:
    """The result of one evaluation, for the objectives that each read a part of it."""

    def __init__(self) -> None:
        self._asked: tuple[object, object] | None = None
        self._result: object = None
        self._taken: set[str] = set()

    def result(
        self,
        reader: str,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        evaluate: Callable[[], object],
    ) -> object:
        """What ``evaluate`` gives for these very lists; every ``reader`` may take it once.

        Who asks again, or for other lists, gets an evaluation of its own.
        """
        same = self._asked is not None and self._asked[0] is prompts and self._asked[1] is responses
        if not same or reader in self._taken:
            found = evaluate()
            # The next reads it, too. One more item than there may be shows that there are too many.
            most = len(responses) + 1
            self._result = list(islice(found, most)) if isinstance(found, Iterator) else found
            self._asked, self._taken = (prompts, responses), set()
        self._taken.add(reader)
        return self._result


class ObjectiveKind(ABC):
    """Base of every kind of objective. A kind says how to ``evaluate``; the checks are here."""

    kind: ClassVar[str]  # what ``objectives[].kind`` in the configuration calls it
    # The score model that ``evaluate`` needs of the engine, which runs it on all ranks of a replica. None:
    # ``evaluate`` runs on the first rank alone, and needs nothing of the engine.
    wanted_model: ScoreModelRequest | None = None
    # Whether ``evaluate_all`` needs ``ResponseFacts``.
    reads_facts: bool = False
    # Whether its result may be a mapping of several objectives (``objectives[].outputs``).
    gives_outputs: ClassVar[bool] = False

    # Whether its errors are those of the user's code; so they are for every kind outside the package.
    calls_user_code: ClassVar[bool] = False

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.name: str = config.name
        self._calls = SharedCall()
        asked = config.output or config.outputs
        if asked is not None and not self.gives_outputs:
            raise self._error(f"outputs: found {asked} with kind {config.kind}, accepted: none")

    @classmethod
    def outline(cls, config: ObjectiveConfig) -> Objective:
        """What a plan needs: the objective, or for a model that is not here, and has a card, an outline."""
        return cls(config)

    def revealed_options(self) -> dict[str, Any]:
        """``config.options`` with the values that ``env:NAME`` and, for secrets, ``file:PATH`` stand for."""
        return revealed(f"objective {self.name!r}: options", self.config.options)

    def share(self, calls: SharedCall) -> None:
        """Evaluate together with the other objectives that read parts of the same result."""
        self._calls = calls

    def attach(self, scorer: TokenScorer) -> None:
        """Take the score model that ``wanted_model`` asks for."""
        raise AssertionError(f"objective {self.name!r} asks for no score model")

    @abstractmethod
    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> object:
        """Raw scores: a sequence, array or tensor of numbers, one per pair."""

    def evaluate_all(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None
    ) -> object:
        """As ``evaluate``, for kinds that read ``facts`` as well, or give a mapping of several objectives."""
        return self.evaluate(prompts, responses)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ``ValueError``, before the first response, for a prompt whose columns it cannot use."""
        return None

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        """Checked scores, clipped to ``[-clip, clip]`` where the configuration says so.

        Raises ``ValueError`` naming the objective (and the index and value at fault) unless there is
        exactly one finite number per pair, for text that UTF-8 cannot hold and for a prompt without one of
        the columns that the objective reads; ``RewardFailed`` for whatever the user's code raises.
        """
        if not responses:
            return []
        self._check_texts(prompts, responses)
        self._check_columns(prompts)
        with self._failures_named():
            scores = self._evaluated(prompts, responses, facts)
        clip = self.config.clip
        return scores if clip is None else [max(-clip, min(clip, score)) for score in scores]

    def _evaluated(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None
    ) -> list[float]:
        if self.config.output is None:
            return self._numbers(self.evaluate_all(prompts, responses, facts), len(responses))
        whole = self._calls.result(
            self.name, prompts, responses, lambda: self.evaluate_all(prompts, responses, facts)
        )
        return self._numbers(self._part(whole, self.config.output, len(responses)), len(responses))

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Name objective, file and line for what the user's code raises, ``sys.exit`` included."""
        if not self.calls_user_code and type(self).__module__.startswith("gapo_mega."):
            yield
            return
        try:
            yield
        except (ObjectiveError, StoppedWaiting, KeyboardInterrupt):
            raise
        except BaseException as error:
            reason = reason_of(error).removeprefix(f"objective {self.name!r}: ")
            text = f"objective {self.name!r}: {place_of(error)}: {reason}"
            raise RewardFailed(text, reason, isinstance(error, ValueError)) from error

    def _part(self, whole: object, output: str, count: int) -> object:
        """The scores called ``output`` in a mapping, or in the mappings of single responses."""
        if isinstance(whole, Mapping):
            return self._named(whole, output, "the result")
        if isinstance(whole, _NO_SCORES) or not isinstance(whole, Iterable):
            raise self._error(
                f"found a result of type {type(whole).__name__}, accepted: a mapping with {output!r}"
            )
        return [
            self._named(item, output, f"the result for response {index}")
            for index, item in enumerate(islice(whole, count + 1))
        ]

    def _named(self, found: object, output: str, where: str) -> object:
        if not isinstance(found, Mapping):
            raise self._error(
                f"found {where} of type {type(found).__name__}, accepted: a mapping with {output!r}"
            )
        if output not in found:
            raise self._error(
                f"found {where} with {', '.join(map(shown, found)) or 'no names'}, accepted: a mapping with "
                f"{output!r} (outputs)"
            )
        return found[output]

    def _check_columns(self, prompts: Sequence[Prompt]) -> None:
        for index, prompt in enumerate(prompts):
            for column in self.config.columns:
                if column not in prompt.columns:
                    found = ", ".join(sorted(prompt.columns)) or "none"
                    raise self._error(
                        f"columns: found {found} with the prompt of response {index}, accepted: {column}"
                    )

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
            several = "" if not isinstance(values, Mapping) else " (outputs makes objectives of a mapping)"
            raise self._error(f"found a result of type {kind}, accepted: a list of scores{several}")
        items = list(islice(values, count + 1))  # what has no end is seen to be too long
        if len(items) != count:
            more = str(len(values)) if isinstance(values, Sized) else f"more than {count}"
            found = len(items) if len(items) < count else more
            raise self._error(f"found {found} scores, accepted: {count}, one for each response")
        return [self._number(index, item) for index, item in enumerate(items)]

    def _number(self, index: int, item: Any) -> float:
        try:
            number = math.nan if isinstance(item, str | bytes) else float(item)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            several = " (outputs makes objectives of a mapping)" if isinstance(item, Mapping) else ""
            kind = f", of type {type(item).__name__}" if isinstance(item, Mapping | Set) else ""
            raise self._error(
                f"found the score {shown(item, _EXCERPT)} for response {index}{kind}, accepted: a finite "
                f"number{several}"
            )
        return number

    def _error(self, what: str) -> ObjectiveError:
        return ObjectiveError(f"objective {self.name!r}: {what}")
