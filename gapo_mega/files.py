"""Names of files as users write them, and text files, read with errors that name the line."""

from __future__ import annotations

import codecs
import os
from pathlib import Path


def expanded(path: str) -> str:
    """``path`` with a leading ``~`` (or ``~user``) replaced by the home directory.

    Every other character means itself, ``$``, ``[``, ``]``, ``?`` and ``*`` too. A relative path stays
    relative to the working directory.
    """
    return os.path.expanduser(path)


def local(path: str | Path) -> Path:
    """``path`` as :func:`expanded` has it."""
    return Path(expanded(str(path)))


def write_private(path: Path, text: str) -> None:
    """Write UTF-8 to ``path``. A file that is new can be read by its owner alone, from its first moment."""
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; a byte order mark at its beginning is no part of it.

    Raises ``ValueError`` that says the line of the first byte that is no UTF-8, without the file's name.
    """
    return decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8))


def decoded(data: bytes) -> str:
    """``data`` as UTF-8 text; ``ValueError`` names the line of the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: found the byte 0x{data[error.start]:02x}, accepted: UTF-8") from None
