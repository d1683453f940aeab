"""The code blocks of a documentation page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
_FILE = re.compile(r"# ([\w./-]+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``file`` is what its first line, a comment, names."""

    language: str
    code: str
    file: str | None


def blocks(page: str) -> list[Block]:
    """All blocks of ``page``, a path in the repository, in their order."""
    found = []
    for language, code in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        name = _FILE.match(code)
        found.append(Block(language, code, name.group(1) if name else None))
    return found
