"""The messages that docs/operations.md explains are those of the code, and those that end a run are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gapo_mega

ROOT = Path(gapo_mega.__file__).parents[1]
GAP = "\0"  # where a message has a value
# In the page: words in capitals, single capitals, dots.
_VALUES = re.compile(r"\b(?!KL\b|SIGTERM\b|JSON\b)[A-Z][A-Z_]*\b|\.\.\.")
_FORMATS = re.compile(r"%[-\d.]*[sdfgr]")


def messages() -> list[str]:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = page.partition("\n## Messages\n")[2].splitlines()
    return [row.split("`")[1] for row in rows if row.startswith("| `")]


def nodes(folder: str = "") -> Iterator[ast.AST]:
    for path in sorted((ROOT / "gapo_mega" / folder).rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def text_of(node: ast.AST) -> str | None:
    """A string with gaps for its values; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _FORMATS.sub(GAP, node.value)
    return None


def texts() -> str:
    """Every string of the package, one a line."""
    return "\n".join(text for node in nodes() if (text := text_of(node)) is not None)


def endings() -> list[str]:
    """What a run says when it does not come to its end: errors of the log, and errors by their beginning.

    Of errors that a setting is at fault for, which say what is accepted, the page has the common ones only.
    """
    found = set()
    for node in nodes("runs"):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        text, called = text_of(node.args[0]) or "", ast.unparse(node.func)
        if called in ("logger.error", "LostPeersError") or text.startswith("stopped"):
            found.add(text)
    return sorted(text for text in found if telling(text))


def telling(text: str) -> list[str]:
    """What a message says beside its values."""
    return [part for part in (part.strip(" ,:()") for part in text.split(GAP)) if len(part) > 8]


@pytest.fixture(scope="module")
def written() -> str:
    return texts()


def test_there_are_messages() -> None:
    assert len(messages()) > 15


@pytest.mark.parametrize("message", messages())
def test_a_message_of_the_page_is_written_by_the_code(message: str, written: str) -> None:
    parts = telling(_VALUES.sub(GAP, message))
    assert parts, message
    for part in parts:
        assert part in written, f"{message!r}: nothing in the package writes {part!r}"


def test_there_are_endings() -> None:
    assert len(endings()) > 8


@pytest.mark.parametrize("text", endings())
def test_a_message_that_ends_a_run_is_on_the_page(text: str) -> None:
    explained = [telling(_VALUES.sub(GAP, message)) for message in messages()]
    assert any(all(part in text for part in parts) for parts in explained), text.replace(GAP, "...")
