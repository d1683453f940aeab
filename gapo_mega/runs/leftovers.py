"""What a killed run left half written in its directory, which the next one removes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from gapo_mega.evaluation.files import CONFIG_FILE, RESOLVED_CONFIG_FILE, partial_of
from gapo_mega.evaluation.report import REPORT_FOLDER, REPORT_PAGE
from gapo_mega.models.huggingface.writing import finish_interrupted
from gapo_mega.rollout.servers.transfers.files import default_folder
from gapo_mega.runs.checkpoints import CHECKPOINTS_FOLDER, incomplete_parts, remove_checkpoint
from gapo_mega.runs.cut_lines import CUT_LINES
from gapo_mega.runs.directory import (
    EXPORT_FOLDER,
    MANIFEST_FILE,
    RESPONSES_FILES,
    RESPONSES_FOLDER,
    RUN_FILES,
)
from gapo_mega.runs.lock import OWNER_FILE
from gapo_mega.scratch import TEMPORARY, remove_left, size_of, tell_removed


def remove_leftovers(directory: Path) -> None:
    """Remove them, and log each with its size. Raises ``OSError``.

    The directory is locked for this run, and runs have written there before.
    """
    finish_interrupted(directory / EXPORT_FOLDER)
    for path in incomplete_parts(directory / CHECKPOINTS_FOLDER):
        size = size_of(path)
        remove_checkpoint(path)
        tell_removed(path, size)
    for path in _partial_files(directory):
        size = size_of(path)
        path.unlink()
        tell_removed(path, size)


def remove_temporary() -> None:
    """Remove what killed processes of this user left among this machine's temporary files, and log each."""
    for folder in {tempfile.gettempdir(), default_folder() or tempfile.gettempdir()}:
        remove_left(Path(folder), TEMPORARY)


def _partial_files(directory: Path) -> Iterator[Path]:
    names = (*RUN_FILES, MANIFEST_FILE, CONFIG_FILE, RESOLVED_CONFIG_FILE, OWNER_FILE)
    # Of names with a number, and of pictures, the whole file need not be there yet.
    patterns = {
        directory: [CUT_LINES],
        directory / REPORT_FOLDER: [REPORT_PAGE, "*.png"],
        directory / RESPONSES_FOLDER: [RESPONSES_FILES],
    }
    found = [partial_of(directory / name) for name in names]
    for folder, wholes in patterns.items():
        found += [path for whole in wholes for path in folder.glob(partial_of(folder / whole).name)]
    yield from (path for path in found if path.is_file() and not path.is_symlink())
