"""Which checkpoints of a run hold what was written: looked at before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapo_mega.models.checkpoint_files import MARKER, SIZE, Listing, fault, listing_of, read_marker
from gapo_mega.runs.checkpoints import BEST, checkpoint_path, named_parts, step_of
from gapo_mega.runs.processes import Peers

logger = logging.getLogger(__name__)

_TOLD = 1e9  # bytes from which on looking at a checkpoint takes long enough to be told


@dataclass(frozen=True)
class Examined:
    """What a look at a run's checkpoints gave.

    Attributes:
        sound: the name of the newest one that holds what was written; None where there is no checkpoint.
        damaged: by name, newest first, what is wrong with those that do not.
    """

    sound: str | None = None
    damaged: Mapping[str, str] = field(default_factory=dict)


def examine(directory: Path, everyone: Peers) -> Examined:
    """Look at the checkpoints in ``directory``, from the newest to the first sound one, and at its best.

    Each rank reads a share of the files. Collective; the same on every rank. Changes nothing. Raises
    ``ValueError`` where there are checkpoints and none is sound.
    """
    names: list[str] = everyone.gather(_names(directory) if everyone.is_main else None)[0]
    damaged: dict[str, str] = {}
    for name in names:
        found, best = _look(directory / name, everyone)
        if found is not None:
            damaged[name] = found
            continue
        if best in names and best not in damaged and best != name:
            wrong, _ = _look(directory / best, everyone)
            damaged |= {best: wrong} if wrong is not None else {}
        return Examined(name, damaged)
    if not damaged:
        return Examined()
    told = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
    raise ValueError(
        f"output_dir: found no sound checkpoint in {directory} ({told}); accepted: a sound one there, "
        "another output_dir, or --overwrite"
    )


def _names(directory: Path) -> list[str]:
    """Everything that is called like a checkpoint, newest first."""
    return [path.name for path in sorted(named_parts(directory), key=step_of, reverse=True)]


def _look(checkpoint: Path, everyone: Peers) -> tuple[str | None, str | None]:
    """What is wrong with ``checkpoint``, if anything, and the name of the best checkpoint by then."""
    about = everyone.gather(_about(checkpoint) if everyone.is_main else None)[0]
    if about["fault"] is not None:
        return about["fault"], None
    if about["files"] is None:
        if everyone.is_main:
            logger.warning("%s lists no checksums (another version wrote it): taken as it is", checkpoint)
        return None, about["best"]
    listing: Listing = about["files"]
    size = sum(entry[SIZE] for entry in listing.values())
    if everyone.is_main and size > _TOLD:
        logger.info("looking whether the %.1f GB of %s are what was written", size / 1e9, checkpoint)
    by_size = sorted(listing, key=lambda name: (-listing[name][SIZE], name))
    mine = by_size[everyone.rank :: everyone.size]
    own = next((wrong for name in mine if (wrong := fault(checkpoint, name, listing[name]))), None)
    return next((found for found in everyone.gather(own) if found is not None), None), about["best"]


def _about(checkpoint: Path) -> dict[str, Any]:
    """What rank 0 reads of ``complete.json``, for all."""
    try:
        marker = read_marker(checkpoint)
        if marker.get("step") != step_of(checkpoint):
            raise ValueError(f"{MARKER}: found step {marker.get('step')!r}, accepted: that of its name")
        files = listing_of(marker)
    except ValueError as error:
        return {"fault": str(error), "files": None, "best": None}
    best = marker.get(BEST)
    step = best.get("step") if isinstance(best, dict) else None
    named = checkpoint_path(checkpoint.parent, step).name if isinstance(step, int) else None
    return {"fault": None, "files": files, "best": named}
