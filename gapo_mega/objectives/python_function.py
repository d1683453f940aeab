"""An objective that is a Python function over prompts, responses and what else it asks for by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives.arguments import Arguments
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.types import Prompt, ResponseFacts
from gapo_mega.user_code import load_function


class PythonFunction(ObjectiveKind):
    """``config.function`` names the function by module or file, ``config.options`` are its keyword arguments.

    It is called as ``function(prompts, responses, **options)``, or with what its parameters ask for by name
    (see ``arguments.Arguments``); with ``config.per_sample`` once for every response. A wrong name or wrong
    arguments raise ``ValueError`` when the objective is built, not in the first step.
    """

    kind: ClassVar[str] = "python"
    gives_outputs: ClassVar[bool] = True
    calls_user_code: ClassVar[bool] = True

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._function = load_function(f"objective {self.name!r}: function", config.function)
        self._options = self.revealed_options()
        try:
            self._arguments = Arguments.of(
                self._function, self._options, per_sample=config.per_sample, columns=config.columns
            )
        except ValueError as error:
            raise self._error(str(error)) from None
        self.reads_facts = self._arguments.reads_facts

    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> object:
        return self.evaluate_all(prompts, responses, None)

    def evaluate_all(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None
    ) -> object:
        given = self._given(prompts, responses, facts)
        if not self.config.per_sample:
            return self._call({name: make() for name, make in given.items()})
        lists = {name: make() for name, make in given.items()}
        return [
            self._call({name: items[index] for name, items in lists.items()})
            for index in range(len(responses))
        ]

    def _call(self, values: dict[str, Any]) -> object:
        positional, named = self._arguments.split(values)
        return self._function(*positional, **named, **self._options)

    def _given(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None
    ) -> dict[str, Callable[[], list[Any]]]:
        """What the function asks for, by the batched names. Copies: it may change what it gets."""
        if facts is None and self.reads_facts:
            raise self._error(
                "found no token_counts and finished, which the function asks for; accepted: a rollout"
            )
        made: dict[str, Callable[[], list[Any]]] = {
            "prompts": lambda: [prompt.text for prompt in prompts],
            "responses": lambda: list(responses),
            "columns": lambda: [
                {name: copy.deepcopy(prompt.columns[name]) for name in self.config.columns}
                for prompt in prompts
            ],
            "messages": lambda: [
                [dict(message) for message in prompt.answered(response)]
                for prompt, response in zip(prompts, responses, strict=True)
            ],
        }
        if facts is not None:
            made["token_counts"] = lambda: list(facts.token_counts)
            made["finished"] = lambda: list(facts.finished)
        return {name: make for name, make in made.items() if name in self._arguments.asked}
