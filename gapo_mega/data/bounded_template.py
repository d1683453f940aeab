"""Chat templates as Jinja, with limits on time and size: they come with models of strangers.

transformers' sandbox keeps a template from Python's objects, not from loops within loops, nor from
``'x' * 20000000000``. Every loop, call, filter, operator and output here pays for what it makes before it
makes it. What a template writes is what transformers writes.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import chain
from typing import Any

from jinja2 import Template, TemplateRuntimeError, nodes
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_SECONDS = 10.0
MOST_CHARACTERS = 200_000_000  # that are made, copied or counted over; every loop and call is one
PER_CHARACTER = 100  # as many more for each that a conversation has
_LARGEST = 1_000_000  # number that a call or filter takes, such as a width
_LARGE_WIDTH = re.compile(r"\d{6}")
_WIDTH = re.compile(r"\d{1,6}")
_END = object()
_LOOK = 256  # what it costs to look at one value
_WITH_WIDTHS = frozenset({"format", "format_map", "strftime_now"})


class TemplateLimit(TemplateRuntimeError):
    """A template takes too long, or makes too much."""


class _Meter:
    """What one rendering may still take."""

    def __init__(self, seconds: float, characters: int) -> None:
        self._seconds, self._characters = seconds, characters
        self._end = time.monotonic() + seconds
        self.left = characters

    def spend(self, characters: int) -> None:
        self.left -= characters
        if self.left < 0:
            raise TemplateLimit(f"makes more than {self._characters} characters, the limit of a template")
        if time.monotonic() > self._end:
            raise TemplateLimit(f"takes longer than {self._seconds:g} s, the limit of a template")


_METER: ContextVar[_Meter | None] = ContextVar("meter", default=None)


def rendered(text: str, values: Mapping[str, Any], seconds: float = MOST_SECONDS) -> str:
    """The template ``text`` filled with ``values``, which are texts, lists, mappings, booleans and None.

    Raises ``jinja2.TemplateError``: where the template is not valid or refuses the values, and
    ``TemplateLimit`` where it goes beyond a limit, or calls itself without an end.
    """
    template = _compiled(text)
    size = _size(values, MOST_CHARACTERS)
    token = _METER.set(_Meter(seconds, MOST_CHARACTERS + PER_CHARACTER * size))
    try:
        return template.render(values)
    except RecursionError:
        raise TemplateLimit("calls itself too deeply") from None
    except MemoryError:
        raise TemplateLimit("makes more than the memory holds") from None
    finally:
        _METER.reset(token)


@functools.lru_cache(maxsize=32)
def _compiled(text: str) -> Template:
    try:
        return _Bounded(text).from_string(text)
    except RecursionError:
        raise TemplateLimit("has blocks too deep within each other") from None


def _spend(characters: int) -> None:
    """Pay. While a template is compiled, where constants are computed, there is only the limit of each."""
    meter = _METER.get()
    if meter is not None:
        meter.spend(characters)
    elif characters > _LARGEST:
        raise TemplateLimit("has a constant that is too large")


def _most() -> int:
    meter = _METER.get()
    return _LARGEST if meter is None else max(meter.left, 0)


class _Bounded(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which everything has its price."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, text: str) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs = _compile_jinja_template("").environment
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            keep_trailing_newline=theirs.keep_trailing_newline,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            finalize=_paid,
        )
        self._text_size = len(text)
        self.globals.update(theirs.globals)
        self.globals.pop("lipsum", None)  # makes any amount of text
        self.filters.update({name: _bounded(name, do) for name, do in theirs.filters.items()})
        self.filters["_counted"] = _counted
        self.filters["_joined"] = _joined
        self.tests.update(theirs.tests)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Priced().visit(tree)  # type: ignore[no-any-return]

    def call(self, context: Any, function: Any, /, *values: Any, **named: Any) -> Any:
        _spend(1 + self._price(function, [*values, *named.values()]))
        return super().call(context, function, *values, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _spend(_price_of_operator(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def _price(self, function: Any, values: Sequence[Any]) -> int:
        if isinstance(function, LoopContext):
            return self._text_size * (1 + _size(values, _most()))
        if isinstance(function, Macro | BlockReference):
            return self._text_size
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps format and format_map
        text = getattr(method, "__self__", None)  # of a text's method
        name = getattr(function, "__name__", "")
        return _price_of_call(name, text if isinstance(text, str | bytes) else "", values)


class _Priced(NodeTransformer):
    """Puts a count into every loop and concatenation."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = _filter(node.iter, "_counted", [nodes.Const(written)])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_joined", [])


def _filter(value: nodes.Node, name: str, arguments: list[nodes.Expr]) -> nodes.Filter:
    assert isinstance(value, nodes.Expr), "what is looped over, or a list"
    return nodes.Filter(value, name, arguments, [], None, None, lineno=value.lineno)


def _counted(values: Iterable[Any], written: int) -> Iterator[Any]:
    for value in values:
        _spend(1 + written)
        yield value


def _joined(values: Sequence[Any]) -> str:
    _spend(_size(values, _most()))
    return "".join(map(str, values))


def _paid(value: Any) -> Any:
    """What is written, paid for."""
    _spend(1 + (len(value) if isinstance(value, str) else _size(value, _most())))
    return value


def _bounded(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays first. Some take the context or the environment before the value."""
    before = 0 if getattr(do, "jinja_pass_arg", None) is None else 1

    @functools.wraps(do)
    def paid(*values: Any, **named: Any) -> Any:
        if name == "join" and isinstance(values[before], Iterator):  # a separator is made for every item
            values = (*values[:before], [_paid(item) for item in values[before]], *values[before + 1 :])
        value, rest = values[before], [*values[before + 1 :], *named.values()]
        _spend(1 + _price_of_call(name, value, rest))
        return do(*values, **named)

    return paid


def _price_of_call(name: str, value: Any, rest: Sequence[Any]) -> int:
    """At most what the method or filter ``name`` of ``value`` makes with the arguments ``rest``."""
    factor = 1
    for argument in rest:
        if isinstance(argument, int | float) and abs(argument) > _LARGEST:
            raise TemplateLimit(f"calls {name} with {argument!r:.40}, more than the {_LARGEST} of a template")
        if isinstance(argument, int | float):
            factor = max(factor, abs(int(argument)) if argument == argument else 1)
        else:
            factor = max(factor, len(argument) if isinstance(argument, str) else _size(argument, _most()))
    if name in _WITH_WIDTHS:
        for text in (value, *rest):
            factor = max(factor, _widest(text))
    return (1 + _size(value, _most())) * (1 + factor)


def _price_of_operator(operator: str, left: Any, right: Any) -> int:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if operator == "+":
        return 1 + (_bytes(left) + _bytes(right) if numbers else _length(left) + _length(right))
    if operator == "**":
        return 1 + _bytes(left) * max(1, int(right) if isinstance(right, int) else 1) if numbers else 1
    if operator == "*":
        if numbers:
            return 1 + _bytes(left) * _bytes(right)
        times = next((value for value in (left, right) if isinstance(value, int)), 1)
        return 1 + max(times, 1) * max(_length(left), _length(right))
    if isinstance(left, str | bytes):  # %
        count = left.count("%") if isinstance(left, str) else len(left)
        return 1 + len(left) + count * (_size(right, _most()) + _widest(left) + _widths(right))
    return 1


def _widths(value: Any) -> int:
    """The largest number in ``value``, which may be a width where the format has ``*``."""
    found = value if isinstance(value, tuple) else (value,)
    return max((abs(number) for number in found if isinstance(number, int)), default=0)


def _widest(text: Any) -> int:
    """The largest width that a format can ask for."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if not isinstance(text, str):
        return 0
    if _LARGE_WIDTH.search(text):
        raise TemplateLimit("formats with a width of six digits or more")
    return max(map(int, _WIDTH.findall(text)), default=0)


def _bytes(value: Any) -> int:
    return 1 + value.bit_length() // 8 if isinstance(value, int) else 8


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 1


def _size(value: Any, most: int) -> int:
    """Characters of ``value`` written out, roughly; or something above ``most``, without looking further."""
    found = 0
    open_ones: list[Iterator[Any]] = [iter((value,))]
    while open_ones and found <= most:
        one = next(open_ones[-1], _END)
        if one is _END:
            open_ones.pop()
            continue
        found += _LOOK
        if isinstance(one, str | bytes):
            found += len(one)
        elif isinstance(one, int):
            found += _bytes(one) * 3
        elif isinstance(one, dict):
            open_ones.append(chain(one.keys(), one.values()))
        elif isinstance(one, Collection):
            open_ones.append(iter(one))
    return found
