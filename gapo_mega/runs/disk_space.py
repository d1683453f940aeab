"""Whether the disk has room for what a run is about to write."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from gapo_mega.planning.disk import DiskPlan
from gapo_mega.scratch import size_of

logger = logging.getLogger(__name__)


def check_plan(directory: Path, plan: DiskPlan, there: int) -> None:
    """Raise ``ValueError`` where the disk of ``directory`` lacks room for ``plan``.

    Warns where there is no room beside it for the checkpoint that a signal or a failure would leave.
    ``there``: bytes of it that earlier processes of the run have written.
    """
    free = free_bytes(directory)
    if plan.needed <= free + there:
        left = free + there - plan.needed
        if not plan.at_once and left < plan.checkpoint:
            logger.warning(
                "%s has %s free: a run that is stopped or fails could leave no checkpoint, which needs %s",
                directory,
                shown(left),
                shown(plan.checkpoint),
            )
        return
    parts = []
    if plan.at_once:
        parts.append(f"{plan.at_once} checkpoint{'s' * (plan.at_once > 1)} of {shown(plan.checkpoint)}")
    if plan.export:
        parts.append(f"an exported model of {shown(plan.export)}")
    beside = f" beside the {shown(there)} of earlier checkpoints" if there else ""
    raise ValueError(
        f"output_dir: found {shown(free)} free in {directory}{beside}, and the run needs "
        f"{shown(plan.needed)} ({' and '.join(parts)}); accepted: a disk with that room, a "
        f"smaller {plan.limit}, or checkpoint.export_hf false"
    )


def check_checkpoint(directory: Path, step: int, needed: int, newest: Path | None) -> None:
    """Raise ``ValueError`` where the disk lacks room for the checkpoint of ``step``.

    ``newest``: the one that stays.
    """
    free = free_bytes(directory)
    if needed > free:
        stays = "there is none before it" if newest is None else f"{newest} stays whole"
        raise ValueError(
            f"the checkpoint of step {step} is not written: found {shown(free)} free in {directory}, and it "
            f"needs {shown(needed)}; {stays}"
        )


def free_bytes(directory: Path) -> int:
    """What a user may write on the disk where ``directory`` is or would be."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def bytes_below(folder: Path) -> int:
    """Of all files below ``folder``; 0 where it is not there."""
    return size_of(folder) if folder.is_dir() else 0


def shown(size: int) -> str:
    """Bytes in GB, or MB where they are few."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
