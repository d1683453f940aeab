"""What a reward function asks for, told by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

# What a function that scores a batch may ask for, and what one that scores a single response calls it.
NAMES = {
    "prompts": "prompt",
    "responses": "response",
    "columns": "columns",
    "messages": "messages",
    "token_counts": "token_count",
    "finished": "finished",
}
_FACTS = frozenset({"token_counts", "finished"})
_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Arguments:
    """How a function is called.

    Attributes:
        asked: keys of ``NAMES`` that it gets.
        positional: whether prompts and responses come first, without names, as in
            ``function(p, r, **options)``; everything else is given by name.
        names: what the function calls each key of ``NAMES``.
    """

    asked: frozenset[str]
    positional: bool
    names: Mapping[str, str]

    @property
    def reads_facts(self) -> bool:
        """Whether it asks for what only a rollout knows."""
        return bool(self.asked & _FACTS)

    def split(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional arguments, and those by name, of ``values`` by the keys of ``NAMES``."""
        first = ["prompts", "responses"] if self.positional else []
        named = {self.names[key]: value for key, value in values.items() if key not in first}
        return [values[key] for key in first], named

    @classmethod
    def of(
        cls,
        function: Callable[..., object],
        options: Mapping[str, Any],
        *,
        per_sample: bool,
        columns: Sequence[str],
    ) -> Arguments:
        """What ``function`` asks for. ``columns``: those that its objective names.

        Raises ``ValueError``, with the parameter of the configuration, for a function that cannot be called.
        """
        names = NAMES if per_sample else {name: name for name in NAMES}
        first_two = frozenset({"prompts", "responses"})
        try:
            signature = inspect.signature(function)
        except ValueError:  # some compiled functions do not tell their arguments
            if columns:
                raise ValueError(
                    f"columns: found {list(columns)}, but the function does not tell its parameters"
                ) from None
            return cls(first_two, True, names)
        parameters = list(signature.parameters.values())
        keys = {name: key for key, name in names.items()}
        positional = _is_positional(parameters, names, options)
        by_position = [p for p in parameters if p.kind in _BY_POSITION][:2] if positional else []
        free = [p for p in parameters if p not in by_position]
        asked = {
            keys[p.name] for p in free if p.name in keys and p.kind in _BY_NAME and p.name not in options
        }
        _check_columns(asked, columns, free, names["columns"], signature)
        found = cls(frozenset(asked | first_two if positional else asked), positional, names)
        _check_call(found, signature, options)
        return found


def _is_positional(parameters: list[Parameter], names: Mapping[str, str], options: Mapping[str, Any]) -> bool:
    """Whether the function takes prompts and responses by position.

    Functions of two arguments of any name do. A function whose first parameter is a known name takes all by
    name, unless that is ``prompts`` and another name follows.
    """
    known = set(names.values())
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters[:2]):
        return True
    first, second = [*(p for p in parameters if p.kind in _BY_POSITION), None, None][:2]
    if first is None:
        return not any(p.name in known for p in parameters)
    named = first.name in known and first.kind in _BY_NAME
    if not named:
        if second is not None and second.name in known - {names["responses"]}:
            raise ValueError(
                f"function: found the parameters {first.name} and {second.name}, accepted: all by name "
                f"({', '.join(names.values())}), or prompts and responses first"
            )
        return True
    return (
        first.name == names["prompts"]
        and second is not None
        and second.name not in known
        and second.name not in options
    )


def _check_columns(
    asked: set[str],
    columns: Sequence[str],
    free: list[Parameter],
    name: str,
    signature: inspect.Signature,
) -> None:
    """``columns`` of the objective and the function's parameter belong together; drop one with a default."""
    if columns and "columns" not in asked:
        raise ValueError(
            f"columns: found {list(columns)}, but the function has no parameter {name!r}; its signature is "
            f"{signature}"
        )
    if "columns" in asked and not columns:
        if next(p for p in free if p.name == name).default is Parameter.empty:
            raise ValueError(
                "columns: found none, but the function asks for columns; accepted: names of columns of the "
                "data, such as [answer]"
            )
        asked.remove("columns")


def _check_call(found: Arguments, signature: inspect.Signature, options: Mapping[str, Any]) -> None:
    try:
        positional, named = found.split(dict.fromkeys(found.asked))
        signature.bind(*positional, **named, **options)
    except TypeError as error:
        form = ", ".join(name for key, name in found.names.items() if key in found.asked)
        raise ValueError(
            f"options: {error}; the function is called as ({form}, **options) and its "
            f"signature is {signature}"
        ) from None
