"""The messages that docs/operations.md explains are those of the code."""

from __future__ import annotations

import ast
import re
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


def texts() -> str:
    """Every string of the package, one a line, with gaps for its values."""
    found = []
    for path in (ROOT / "gapo_mega").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(_FORMATS.sub(GAP, node.value))
    return "\n".join(found)


@pytest.fixture(scope="module")
def written() -> str:
    return texts()


def test_there_are_messages() -> None:
    assert len(messages()) > 15


@pytest.mark.parametrize("message", messages())
def test_a_message_of_the_page_is_written_by_the_code(message: str, written: str) -> None:
    fragments = [part.strip(" ,:()") for part in _VALUES.sub(GAP, message).split(GAP)]
    telling = [part for part in fragments if len(part) > 8]
    assert telling, message
    for part in telling:
        assert part in written, f"{message!r}: nothing in the package writes {part!r}"
