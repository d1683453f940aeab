"""A judge of two responses behind an OpenAI-compatible endpoint (``/chat/completions``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from gapo_mega.config.fields import Name
from gapo_mega.objectives.json_service import JsonService, ServiceOptions
from gapo_mega.types import Message

Verdict = Literal["first", "second", "neither"]
Rubric = Annotated[str, Field(min_length=1)]

_SYSTEM = (
    "You compare two responses to the same conversation. Judge by this alone: {rubric} The order of the two, "
    "their length and their style must not count unless it says so. Give a short reason. Then write your "
    "verdict on a line of its own: [[A]] if response A is better, [[B]] if response B is better, [[C]] if "
    "neither is."
)
_USER = (
    "[The conversation]\n{conversation}\n\n[Response A]\n{first}\n[End of response A]\n\n"
    "[Response B]\n{second}\n[End of response B]"
)
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_MEANINGS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "neither"}
_ACCEPTED = '{"choices": [{"message": {"content": TEXT}}]}'


class PairwiseOptions(ServiceOptions):
    """The judge of ``gapo-mega evaluate --judge``; ``url`` ends before ``/chat/completions``."""

    model: str = Field(min_length=1, description="what the endpoint calls the model")
    rubrics: dict[Name, Rubric] = Field(
        min_length=1, description="by name, what makes a response the better one"
    )
    max_tokens: int = Field(512, ge=1, description="longest answer of the judge")
    temperature: float = Field(0.0, ge=0, description="of the judge's sampling")


class PairwiseJudge:
    """Asks which of two responses is better. ``ask`` may be called from several threads."""

    def __init__(self, options: PairwiseOptions, where: str) -> None:
        """``where``: what errors begin with. Raises ``ValueError`` for credentials that are not there."""
        self._options = options
        self._service = JsonService(options, lambda what: ValueError(f"{where}: {what}"), "/chat/completions")

    def request(
        self, rubric: str, conversation: Sequence[Message], first: str, second: str
    ) -> dict[str, object]:
        """What is posted: equal requests are equal questions."""
        turns = "\n\n".join(f"{message['role']}: {message['content']}" for message in conversation)
        user = _USER.format(conversation=turns, first=first, second=second)
        return {
            "model": self._options.model,
            "messages": [
                {"role": "system", "content": _SYSTEM.format(rubric=self._options.rubrics[rubric].strip())},
                {"role": "user", "content": user},
            ],
            "temperature": self._options.temperature,
            "max_tokens": self._options.max_tokens,
        }

    def ask(self, request: dict[str, object]) -> str:
        """The judge's words. Raises ``ValueError`` for an endpoint that does not answer as it should."""
        reply = self._service.post(request, _ACCEPTED)
        try:
            content = reply.content["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise reply.fault("no text of a choice")
        return content


def verdict_of(words: str) -> Verdict | None:
    """What the last verdict in ``words`` says; None where there is none."""
    found = _VERDICT.findall(words)
    return _MEANINGS[found[-1]] if found else None
