"""Writes docs/reference/configuration.md from the configuration's classes and the plug-in folders.

python tools/configuration_reference.py            # writes the page
python tools/configuration_reference.py --check    # fails where the page is not current
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from gapo_mega import advantages, aggregation, losses, objectives, scalarization
from gapo_mega.aggregation import Aggregator
from gapo_mega.config import Config, GradientConfig, Section, strategies
from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig
from gapo_mega.config.sweep import SweepConfig
from gapo_mega.runs.loggers import loggers
from gapo_mega.user_code import is_subclass

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "configuration.md"

COMMANDS: list[tuple[str, type[Section]]] = [
    ("gapo-mega train", Config),
    ("gapo-mega sft", SftConfig),
    ("gapo-mega train-reward", RewardModelConfig),
    ("gapo-mega train-pairs", PairsConfig),
    ("gapo-mega sweep", SweepConfig),
]

HEAD = """\
# Configuration reference

<!-- Written by tools/configuration_reference.py; a test compares it with the code. -->

Every field that a YAML file or a `key=value` on the command line can set.
`gapo-mega train --config FILE --dry-run` prints all of them with the values that a run would take. An unknown
key, a wrong type and a value out of range end the run in one line that names the key, what was found and what
is accepted.
"""

PLUGIN_HEAD = """\
## Options of the methods

`name` chooses a method (`kind` an objective), and `options` configure it. [Extending](../extending.md) shows
how to add one.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    seen: dict[type[Section], str] = {}
    for command, kind in COMMANDS:
        parts += [f"## `{command}`\n", f"{sentences(kind)}\n"]
        parts += sections(command, kind, seen)
    parts.append(PLUGIN_HEAD)
    parts += methods("aggregation", aggregation.methods(), Aggregator)
    parts += methods("scalarization", scalarization.scalarizers(), None)
    parts += methods("advantages", advantages.estimators(), None)
    parts += methods("loss", losses.losses(), None)
    parts += methods("logging.loggers", loggers(), None)
    parts += objective_kinds()
    return "\n".join(parts)


def sections(command: str, kind: type[Section], seen: dict[type[Section], str]) -> Iterator[str]:
    """The table of a configuration's own fields, then one of every section in it."""
    yield table(kind, "")
    for path, section, count in nested(kind, ""):
        title = f"`{path.rstrip('.')}` of `{command}`"
        yield f"### {title}\n"
        yield f"{sentences(section)}{f' A list of {count}.' if count else ''}\n"
        if section in seen:
            yield f"The same fields as [{seen[section]}](#{anchor(seen[section])}).\n"
            continue
        seen[section] = title
        yield table(section, path)


def anchor(title: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def nested(kind: type[Section], before: str) -> Iterator[tuple[str, type[Section], str]]:
    """Path, class and number (of a list) of every section below ``kind``, in the order of the file."""
    for name, field in kind.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            path = f"{before}{name}.{'N.' if get_origin(field.annotation) is list else ''}"
            yield path, section, ", ".join(limits(field.metadata))
            yield from nested(section, path)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, alone or in a list."""
    for candidate in (annotation, *get_args(annotation)):
        if is_subclass(candidate, Section):
            return candidate
    return None


def table(kind: type[Section], before: str) -> str:
    """A section's fields, but for those that are sections and have a table of their own."""
    rows = []
    for name, field in kind.model_fields.items():
        if section_of(field.annotation) is not None:
            continue
        assert field.description, f"{kind.__name__}.{name} has no description"
        shown = "*required*" if field.is_required() else code(field.get_default(call_default_factory=True))
        accepted = ", ".join(limits(field.metadata))
        kind_of_value = type_name(field.annotation)
        if (kind, name) == (GradientConfig, "store"):  # a text, whose values the strategies declare
            kind_of_value = ", ".join(map(code, strategies.stores()))
        rows.append([f"`{before}{name}`", kind_of_value, shown, accepted, field.description])
    return grid(["key", "type", "default", "accepted", "meaning"], rows)


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def type_name(annotation: Any) -> str:
    """A field's type, in the words of somebody who writes YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([type_name(arguments[0]), *(f"({text})" for text in limits(arguments[1:]))])
    if origin is Literal:
        return ", ".join(code(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is not None and issubclass(origin, Mapping):
        return "mapping"
    if origin is not None:  # a list, or a sequence of a plug-in's options
        return f"list of {type_name(arguments[0])}"
    names = {str: "text", bool: "true, false", int: "whole number", float: "number", types.NoneType: "null"}
    return names.get(annotation, str(annotation))


def limits(metadata: Any) -> Iterator[str]:
    """The range that a field declares."""
    lengths = {type(item): item for item in metadata}
    if MinLen in lengths and MaxLen in lengths:
        least, most = lengths[MinLen].min_length, lengths[MaxLen].max_length
        yield f"{most} items" if least == most else f"{least} to {most} items"
        return
    for item in metadata:
        if isinstance(item, Ge):
            yield f">= {item.ge}"
        elif isinstance(item, Gt):
            yield f"> {item.gt}"
        elif isinstance(item, Le):
            yield f"<= {item.le}"
        elif isinstance(item, Lt):
            yield f"< {item.lt}"
        elif isinstance(item, MinLen):
            yield f"{item.min_length} item or more"
        elif isinstance(item, FieldInfo):
            yield from limits(item.metadata)
        elif getattr(item, "pattern", None):
            yield f"`{item.pattern}`"


def code(value: Any) -> str:
    """A value as YAML writes it."""
    text = yaml.safe_dump(value.value if isinstance(value, Enum) else value, default_flow_style=True)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def sentences(kind: type) -> str:
    """A class's docstring as Markdown."""
    assert kind.__doc__, f"{kind.__name__} has no docstring"
    return inspect.cleandoc(kind.__doc__).replace("``", "`")


def methods(section: str, found: Mapping[str, type], base: type | None) -> Iterator[str]:
    """The options of every method in a folder; those of ``base`` are common to all."""
    yield f"### `{section}.options`\n"
    common = set()
    if base is not None:
        common = {field.name for field in dataclasses.fields(base)}
        yield f"Every method takes\n\n{options(base, set())}"
        yield f"{options_text(base)}\n"
    for name, method in sorted(found.items()):
        yield f"#### `{section}.name: {name}`\n"
        yield f"{sentences(method)}\n"
        for parent in inherited(method, base):
            yield f"{options_text(parent)}\n"
        if any(field.init and field.name not in common for field in dataclasses.fields(method)):
            yield options(method, common)
        else:
            yield "It has no options of its own.\n"


def inherited(method: type, base: type | None) -> list[type]:
    """The classes between a method and ``base`` that tell of options of theirs."""
    if base is None:
        return []
    above = [parent for parent in method.__mro__[1:] if issubclass(parent, base) and parent is not base]
    return [parent for parent in above if dataclasses.is_dataclass(parent) and options_text(parent)]


def options_text(base: type) -> str:
    """The paragraphs of the docstring of ``base`` that begin with an option."""
    names = {field.name for field in dataclasses.fields(base)}
    paragraphs = sentences(base).split("\n\n") if base.__doc__ else []
    return "\n\n".join(text for text in paragraphs if text.startswith(tuple(f"`{name}`" for name in names)))


def options(method: type, common: set[str]) -> str:
    """The fields of a dataclass, without the common ones."""
    hints = get_type_hints(method)
    rows = [
        [f"`{field.name}`", type_name(hints[field.name]), code(field.default)]
        for field in dataclasses.fields(method)
        if field.init and field.name not in common
    ]
    return grid(["option", "type", "default"], rows)


def objective_kinds() -> Iterator[str]:
    """The options of every kind of objective; a Python function's are its own arguments."""
    yield "### `objectives.N.options`\n"
    for name, kind in sorted(objectives.kinds().items()):
        yield f"#### `objectives.N.kind: {name}`\n"
        yield f"{sentences(kind)}\n"
        section = vars(importlib.import_module(kind.__module__)).get(f"{kind.__name__}Options")
        if section is not None:
            yield table(section, "")


def main() -> None:
    """Write the page, or compare it."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not current; run python tools/configuration_reference.py")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
