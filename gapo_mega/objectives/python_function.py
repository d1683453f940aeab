"""An objective that is a Python function ``module:function(prompts, responses, **options) -> scores``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import ClassVar

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.types import Prompt

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class PythonFunction(ObjectiveKind):
    """``config.function`` names the function, ``config.options`` are its keyword arguments.

    Everything that can be wrong with the name or the arguments is a ``ValueError`` when the objective
    is built, not in the first step.
    """

    kind: ClassVar[str] = "python"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        found = config.function
        if found is None or not _FUNCTION.fullmatch(found):
            raise self._error(f"function: found {found!r}, accepted: 'module:function'")
        module_name, function_name = found.split(":")
        self._function = self._look_up(self._import(module_name), function_name)
        self._check_arguments()

    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> object:
        return self._function([prompt.text for prompt in prompts], list(responses), **self.config.options)

    def _import(self, module_name: str) -> ModuleType:
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # The module itself, not something that it imports in turn.
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise self._error(
                f"function: found module {module_name!r}, which Python does not find "
                f"({error.name!r} is missing); install it or put its folder on PYTHONPATH"
            ) from None

    def _look_up(self, module: ModuleType, function_name: str) -> Callable[..., object]:
        members = vars(module)
        if function_name not in members:
            public = [name for name, value in members.items() if callable(value) and not name.startswith("_")]
            nearest = difflib.get_close_matches(function_name, public, n=1, cutoff=0.0)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise self._error(f"function: module {module.__name__!r} has no {function_name!r}{hint}")
        function = members[function_name]
        if not callable(function):
            raise self._error(
                f"function: found {module.__name__}:{function_name} of type {type(function).__name__}, "
                "accepted: a function"
            )
        checked: Callable[..., object] = function
        return checked

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
