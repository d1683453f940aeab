"""Checksums of a checkpoint that the ranks of a run have just written."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

from gapo_mega.models.checkpoint_files import Listing, measured, names_in
from gapo_mega.runs.processes import Peers


def checksums(directory: Path, everyone: Peers, own: Listing = MappingProxyType({})) -> Listing:
    """Size and CRC-32 of every file in ``directory``, of which each rank reads a share. Collective.

    The main rank reads what others do not see, and has all. Raises ``OSError``.

    ``own``: those that this rank has taken already.
    """
    taken = {name: dict(entry) for part in everyone.gather(dict(own)) for name, entry in part.items()}
    names: list[str] = everyone.gather(names_in(directory) if everyone.is_main else [])[0]
    names = [name for name in names if name not in taken]
    seen = [name for name in names[everyone.rank :: everyone.size] if (directory / name).is_file()]
    found: dict[str, Any] = taken
    for part in everyone.gather({name: measured(directory / name) for name in seen}):
        found |= part
    if everyone.is_main:
        found |= {name: measured(directory / name) for name in names if name not in found}
    return dict(sorted(found.items()))
