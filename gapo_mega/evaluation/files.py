"""Files of a run directory: which configuration counts, and writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gapo_mega.files import write_private

POINTS_FOLDER = "points"  # of a sweep's directory, with a run's directory for every point
CONFIG_FILE = "config.yaml"
RESOLVED_CONFIG_FILE = "config.resolved.yaml"  # the run's, where ``config.yaml`` is the user's own


def config_file(run_dir: Path) -> Path:
    """The configuration that the run in ``run_dir`` recorded, whether it is there or not."""
    resolved = run_dir / RESOLVED_CONFIG_FILE
    return resolved if resolved.is_file() else run_dir / CONFIG_FILE


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; readers see the old file or the new one, and never a part.

    Its owner alone may read it: what a run writes may repeat its configuration.
    """
    with replacing(path) as partial:
        partial.unlink(missing_ok=True)  # a killed process's may be open to others
        write_private(partial, text)


def write_data(path: Path, text: str) -> None:
    """As :func:`write_text`, for numbers and texts of the run, which others may read as the umask has it."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, with the suffix of ``path``, that takes its place when the block ends well.

    After an error nothing is left of it. What was written is on the disk when the block has ended.
    """
    partial = partial_of(path)
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where ``replacing`` writes; a killed process leaves it."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
