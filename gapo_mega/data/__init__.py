"""Data files that ship with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path


def path(name: str) -> Path:
    """The packaged file ``name`` (``"prompts.jsonl"``). ``ValueError`` where there is none.

    Wheels are unpacked when they are installed, so the file exists on disk for as long as the package does.
    """
    folder = files(__package__)
    with as_file(folder) as directory:
        found = sorted(entry.name for entry in directory.glob("*.jsonl"))
        if name not in found:
            raise ValueError(f"packaged data file: found {name!r}, accepted: {found}")
        return directory / name
