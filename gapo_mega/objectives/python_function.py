"""An objective that is a Python function ``module:function(prompts, responses, **options) -> scores``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.types import Prompt
from gapo_mega.user_code import load_function


class PythonFunction(ObjectiveKind):
    """``config.function`` names the function by module or file, ``config.options`` are its keyword arguments.

    A wrong name or wrong arguments raise ``ValueError`` when the objective is built, not in the first step.
    """

    kind: ClassVar[str] = "python"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._function = load_function(f"objective {self.name!r}: function", config.function)
        self._check_arguments()

    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> object:
        return self._function([prompt.text for prompt in prompts], list(responses), **self.config.options)

    def _check_arguments(self) -> None:
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # some compiled functions do not tell their arguments
            return
        try:
            signature.bind([], [], **self.config.options)
        except TypeError as error:
            raise self._error(
                f"options: {error}; the function is called as (prompts, responses, **options) and its "
                f"signature is {signature}"
            ) from None
