"""What is cut from ``metrics.jsonl`` when a run goes on or starts again is kept in a file beside it."""

from __future__ import annotations

import json
import logging
import shlex
from itertools import count
from pathlib import Path

from gapo_mega.evaluation.files import write_data
from gapo_mega.evaluation.series import METRICS_FILE
from gapo_mega.option_checks import shown

logger = logging.getLogger(__name__)

CUT_LINES = "metrics.cut-*.jsonl"


def check_lines(directory: Path) -> None:
    """Raise ``ValueError`` for a line of the log that is no step's."""
    _lines(directory)


def keep_cut_lines(directory: Path, updates: int) -> Path | None:
    """Copy the log's lines after the first ``updates`` optimizer steps to a new file, if there are any.

    Returns its path. Warns where the log lacks some of the first ``updates``.
    """
    found = _lines(directory)
    missing = updates - len({step for step, _ in found if step <= updates})
    if missing:
        logger.warning(
            "%s lacks %d of the %d optimizer steps that the checkpoint contains",
            directory / METRICS_FILE, missing, updates,
        )  # fmt: skip
    cut = [line for step, line in found if step > updates]
    if not cut:
        return None
    names = (directory / CUT_LINES.replace("*", str(number)) for number in count(1))
    path = next(path for path in names if not path.exists())
    write_data(path, "".join(cut))
    logger.warning(
        "%s: %d lines of steps after %d, which no checkpoint contains, are now in %s",
        directory / METRICS_FILE, len(cut), updates, path.name,
    )  # fmt: skip
    return path


def _lines(directory: Path) -> list[tuple[int, str]]:
    """Step and text of every complete line; a process killed while writing leaves one without its end."""
    path = directory / METRICS_FILE
    if not path.is_file():
        return []
    found: list[tuple[int, str]] = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            found.append((_step(line), line.decode("utf-8") + "\n"))
        except (ValueError, TypeError, KeyError, RecursionError):
            text = shown(line.decode("utf-8", "replace").strip(), 62)
            raise ValueError(
                f"output_dir: {path}, line {number}: found {text}, "
                "accepted: the log of a run, or another output_dir (where the log is damaged, this takes the "
                f"line out and keeps a copy: sed -i.damaged {number}d {shlex.quote(str(path))})"
            ) from None
    return found


def _step(line: bytes) -> int:
    """The optimizer step of a line; raises for what is none."""
    step = json.loads(line.decode("utf-8"))["step"]
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError
    return step
