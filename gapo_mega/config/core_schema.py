"""YAML by the core schema of version 1.2, safe, without double keys; and texts that are read back as texts.

PyYAML follows version 1.1, where ``1e-6`` is a text, ``010`` is 8, ``1:30`` is 90 and ``no`` is false. Here
only the scalars of https://yaml.org/spec/1.2.2/#103-core-schema are no texts. The merge key ``<<`` of
version 1.1 stays, because users share sections with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_MOST = 100_000
_DEEPEST = 40  # lists and mappings within each other: what writes the configuration again goes no deeper
# Version 1.1, and so PyYAML, ends a line at these, and folds the spaces around; version 1.2 does not.
_NO_BREAKS = ("\x85", "\u2028", "\u2029")
_PRIVATE = range(0xE000, 0xF900)  # characters that nobody has given a meaning
# The order matters: an integer also looks like a float.
_SCALARS: dict[str, re.Pattern[str]] = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(rf"(?:{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"),
    "merge": re.compile(r"<<\Z"),
}
# What PyYAML looks up by a text's first character; None: for any.
_OF_1_2: dict[Any, Any] = {None: [(f"{_TAG}{kind}", pattern) for kind, pattern in _SCALARS.items()]}
_OF_BOTH: dict[Any, Any] = {**yaml.SafeDumper.yaml_implicit_resolvers, **_OF_1_2}


def parse_document(text: str) -> Any:
    """What the one YAML document ``text`` holds; sections shared by anchors are copies of their own.

    Raises ``ValueError`` in one line, which begins with the line of the fault where there is one.
    """
    return _parsed(text, _Loader)


def parse_value(text: str) -> Any:
    """The value of an override.

    One that begins with ``[``, ``{``, ``"``, ``'`` or ``!`` is YAML without comments. Any other is one plain
    scalar: null, a boolean or a number of the core schema, else the text as it stands, without the spaces
    around it. Raises ``ValueError`` as :func:`parse_document` does.
    """
    stripped = text.strip()
    if stripped.startswith(("[", "{", '"', "'", "!")):
        return _parsed(stripped, _WithoutComments)
    for kind, pattern in _SCALARS.items():
        if kind != "merge" and pattern.match(stripped):
            return _BUILDERS[kind](stripped)
    return stripped


def written(data: Any) -> str:
    """``data`` as YAML that :func:`parse_document` and readers of version 1.1 read back alike."""
    # With allow_unicode, PyYAML would write some characters that it cannot read back.
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False)
    return text


def _parsed(text: str, loader: type[_Loader]) -> Any:
    try:
        return _unshared(yaml.load(text, Loader=loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # PyYAML splits one sentence in two where there is a second document.
        parts = (error.context, error.problem) if f"{error.problem}".startswith("but ") else (error.problem,)
        what = " ".join(" ".join(part for part in parts if part).split())
        raise ValueError(f"line {mark.line + 1}: {what}" if mark else what) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"line {line}: found the character {chr(int(error.character))!r}, accepted: "
            "characters that print (others: as an escape in double quotes)"
        ) from None
    except RecursionError:
        raise ValueError("found lists or mappings too deep within each other") from None


def check_size(data: Any, source: object) -> None:
    """Raises ``ValueError`` where ``parse_document`` would refuse ``data`` once it is written."""
    try:
        _unshared(data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _unshared(data: Any) -> Any:
    """A copy in which no list or mapping occurs twice: to change one would change the other.

    Raises ``ValueError`` where anchors within anchors would make more than ``_MOST`` values of a short text.
    """
    count = 0

    def copied(value: Any, depth: int = 0) -> Any:
        nonlocal count
        count += 1
        if depth > _DEEPEST:
            raise ValueError(f"found lists or mappings more than {_DEEPEST} deep within each other")
        if count > _MOST:
            raise ValueError(f"found anchors that stand for more than {_MOST} values")
        if isinstance(value, dict):
            return {key: copied(item, depth + 1) for key, item in value.items()}
        return [copied(item, depth + 1) for item in value] if isinstance(value, list) else value

    return copied(data)


def _check_keys(node: MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise _error(
                f"found a {key.id} as key, accepted: a text (a text that begins with {{ or [ needs quotes)",
                key.start_mark,
            )
        if key.tag not in (f"{_TAG}str", _MERGE):
            raise _error(
                f"key {key.value!r}: found no text, accepted: '{key.value}' in quotes", key.start_mark
            )
        if key.value in seen:
            raise _error(f"key {key.value!r} is given twice", key.start_mark)
        seen.add(key.value)


def _error(what: str, mark: yaml.Mark | None) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, mark)


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    try:
        return int(text[2:] if base != 10 else text, base)
    except ValueError:
        raise ValueError(f"found an integer of {len(text)} digits, accepted: fewer") from None


def _float(text: str) -> float:
    return float(text.replace(".", "", 1) if text[-1].isalpha() else text)


_BUILDERS: Mapping[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": _float,
}


def _builder(kind: str) -> Callable[[yaml.SafeLoader, Any], Any]:
    def build(loader: yaml.SafeLoader, node: Any) -> Any:
        value = loader.construct_scalar(node)
        # An explicit tag, such as !!int "x", also comes here.
        accepted = _SCALARS["int"].match(value) if kind == "float" else None
        if not _SCALARS[kind].match(value) and not accepted:
            raise _error(f"found {value!r} with the tag !!{kind}", node.start_mark)
        try:
            return _BUILDERS[kind](value)
        except ValueError as error:
            raise _error(str(error), node.start_mark) from None

    return build


def _text(loader: _Loader, node: Any) -> str:
    text = str(loader.construct_yaml_str(node))
    for character, stand_in in loader.stand_ins.items():
        text = text.replace(stand_in, character)
    # JSON spells characters beyond U+FFFF as two escapes.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _unknown(loader: yaml.SafeLoader, node: Any) -> Any:
    raise _error(
        f"found the tag {node.tag.replace(_TAG, '!!')}, accepted: none (or a text in quotes)",
        node.start_mark,
    )


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the scalars of version 1.2, and nothing that makes other objects."""

    yaml_implicit_resolvers = _OF_1_2
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        **{f"{_TAG}{kind}": _builder(kind) for kind in _BUILDERS},
        f"{_TAG}str": _text,
        f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
        f"{_TAG}map": yaml.SafeLoader.construct_yaml_map,
        None: _unknown,
    }

    def __init__(self, stream: str) -> None:
        # Not there as they are, nor by an escape.
        folded = stream.lower()
        spare = (chr(code) for code in _PRIVATE if chr(code) not in stream and f"{code:x}" not in folded)
        self.stand_ins = dict(zip(_NO_BREAKS, spare, strict=False))
        super().__init__(stream.translate({ord(end): stand_in for end, stand_in in self.stand_ins.items()}))
        self._open: set[str] = set()  # anchors of the mappings and lists that are being read

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            if event.anchor in self._open:
                raise _error(f"found *{event.anchor} within &{event.anchor} itself", event.start_mark)
        return super().compose_node(parent, index)

    def compose_sequence_node(self, anchor: Any) -> SequenceNode:
        node: SequenceNode = self._within(anchor, super().compose_sequence_node)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node: MappingNode = self._within(anchor, super().compose_mapping_node)
        _check_keys(node)  # here, once a mapping: merging changes it later
        return node

    def _within(self, anchor: Any, compose: Callable[[Any], Any]) -> Any:
        if anchor is not None:
            self._open.add(anchor)
        node = compose(anchor)
        self._open.discard(anchor)
        return node


class _WithoutComments(_Loader):
    """For overrides, where ``#`` begins no comment: after a value it is an error, not a cut."""

    def scan_to_next_token(self) -> None:
        while self.peek() in " \n":
            if self.peek() == "\n" and not self.flow_level:
                self.allow_simple_key = True
            self.forward()


class _Dumper(yaml.SafeDumper):
    """Quotes every text that version 1.1 or 1.2 reads as something else."""

    yaml_implicit_resolvers = _OF_BOTH

    def ignore_aliases(self, data: Any) -> bool:
        return True
