"""What an earlier end of a run has left, once the run goes on: nothing of it may pass for the longer run's.

It is renamed (``hf`` becomes ``hf.earlier-1``), said in the log, and never deleted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from itertools import count
from pathlib import Path

from gapo_mega.evaluation.files import flush
from gapo_mega.evaluation.heldout_answers import HELDOUT_FILE
from gapo_mega.evaluation.report import REPORT_FOLDER
from gapo_mega.evaluation.summary import SUMMARY_FILE
from gapo_mega.runs.directory import ADAPTER_FOLDER, EXPORT_FOLDER, forget_files
from gapo_mega.runs.lock import disk_errors

logger = logging.getLogger(__name__)

# The summary last: where a process is killed on the way, the next one renames the rest and knows the step.
_OF_AN_END = (EXPORT_FOLDER, ADAPTER_FOLDER, HELDOUT_FILE, REPORT_FOLDER, SUMMARY_FILE)


def set_aside_ends(directory: Path, goes_on_from: int) -> None:
    """Rename what ends of the run in ``directory`` have left; it is about to train on.

    ``goes_on_from``: steps that it has done. Raises ``ValueError`` where the disk refuses.
    """
    there = _there(directory)
    if not there:
        return
    step = _step_of(directory / SUMMARY_FILE)
    _rename(directory, there, f"{_of_step(step)}, and the run goes on from step {goes_on_from}")


def set_aside_others(directory: Path, step: int, written: Collection[str]) -> None:
    """Rename what an earlier end has left of another step, unless this one writes it again.

    Args:
        step: whose policy is the result of the run now.
        written: names of what this end writes.

    Raises ``ValueError`` where the disk refuses.
    """
    there = [name for name in _there(directory) if name not in written]
    before = _step_of(directory / SUMMARY_FILE)
    if there and before != step:
        _rename(directory, there, f"{_of_step(before)}, and the result of the run is of step {step}")


def _there(directory: Path) -> list[str]:
    found = [name for name in _OF_AN_END if (directory / name).exists() or (directory / name).is_symlink()]
    # While a run goes on, its evaluations write the report.
    return [] if found == [REPORT_FOLDER] else found


def _step_of(summary: Path) -> int | None:
    """The step that an end's numbers, and so its model, are of; None where that is not known."""
    try:
        document = json.loads(summary.read_text(encoding="utf-8"))
        return int(document.get("step", document["steps"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or another version's
        return None


def _of_step(step: int | None) -> str:
    return "of an end that was not completed" if step is None else f"of the end at step {step}"


def _rename(directory: Path, names: Collection[str], why: str) -> None:
    renamed = _new_names(directory, names)
    with disk_errors(directory):
        forget_files(directory, names)
        for name in names:
            (directory / name).rename(directory / renamed[name])
        flush(directory)
    logger.warning("set aside: %s (%s)", ", ".join(f"{name} is now {renamed[name]}" for name in names), why)


def _new_names(directory: Path, names: Collection[str]) -> dict[str, str]:
    """The same free number for all."""
    for number in count(1):
        found = {name: _numbered(name, number) for name in names}
        taken = (directory / _numbered(name, number) for name in _OF_AN_END)
        if not any(path.exists() or path.is_symlink() for path in taken):
            return found
    raise AssertionError("count() does not end")


def _numbered(name: str, number: int) -> str:
    path = Path(name)
    return f"{path.stem}.earlier-{number}{path.suffix}"
