"""What an output directory holds: whose files these are, whether a run has ended there, what may go.

A run writes ``MANIFEST_FILE`` before anything else; it names what the run writes. Names of that list that are
there without it are somebody else's, unless they look like what an earlier version of a run wrote.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapo_mega.config import CheckpointConfig, LoggingConfig
from gapo_mega.evaluation.files import write_text
from gapo_mega.evaluation.heldout_answers import HELDOUT_FILE
from gapo_mega.evaluation.report import REPORT_FOLDER
from gapo_mega.evaluation.series import METRICS_FILE
from gapo_mega.evaluation.summary import SUMMARY_FILE
from gapo_mega.runs.checkpoints import (
    CHECKPOINTS_FOLDER,
    complete_steps,
    is_foreign,
    parts_of,
    remove_checkpoint,
    set_aside,
)
from gapo_mega.runs.cut_lines import CUT_LINES, check_lines
from gapo_mega.runs.lock import disk_errors
from gapo_mega.runs.recorded_config import check_config_files, remove_config
from gapo_mega.scratch import MADE_BY

logger = logging.getLogger(__name__)

MANIFEST_FILE = ".gapo-mega.json"
EXPORT_FOLDER = "hf"
ADAPTER_FOLDER = "adapter"
TENSORBOARD_FOLDER = "tensorboard"
RESPONSES_FOLDER = "responses"
WANDB_ID = "wandb_id"
RESPONSES_FILES = "step_*.jsonl"
LOGGERS_FILE = "loggers.json"  # what loggers keep for the process that resumes the run
AUDIT_FILES = ("audit/audit.csv", "audit/audit.png")

RUN_FILES = (METRICS_FILE, SUMMARY_FILE, HELDOUT_FILE, WANDB_ID, LOGGERS_FILE)
_EXPORTS = (EXPORT_FOLDER, ADAPTER_FOLDER)
_FOLDERS = (CHECKPOINTS_FOLDER, *_EXPORTS, REPORT_FOLDER, TENSORBOARD_FOLDER, RESPONSES_FOLDER)
# Keys of which a metrics line, or a summary, of every kind of run has all.
_METRICS_KEYS = {"step", "gradient_norm", "tokens_per_second"}
_SUMMARY_KEYS = ({"objectives", "seconds"}, {"steps", "training_items", "heldout"})
_WAYS_OUT = "--overwrite, another output_dir"


@dataclass(frozen=True)
class Wanted:
    """What a command is about to do in an output directory."""

    command: str  # gapo-mega train, ...
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    report: bool  # whether it writes one
    responses: bool = False  # whether it keeps those that it trains on
    adapter: bool = False  # whether it exports one

    @property
    def names(self) -> list[str]:
        """What the run writes, by name."""
        listed = {entry.name for entry in self.logging.loggers}
        optional = {
            EXPORT_FOLDER: self.checkpoint.export_hf,
            ADAPTER_FOLDER: self.adapter,
            REPORT_FOLDER: self.report,
            HELDOUT_FILE: self.report,  # of trainings, which answer held-out prompts
            TENSORBOARD_FOLDER: self.logging.tensorboard or "tensorboard" in listed,
            WANDB_ID: self.logging.wandb or "wandb" in listed,
            LOGGERS_FILE: bool(listed),
            RESPONSES_FOLDER: self.responses,
        }
        always = [METRICS_FILE, SUMMARY_FILE, CHECKPOINTS_FOLDER]
        return always + [name for name, wanted in optional.items() if wanted]


@dataclass(frozen=True)
class Manifest:
    """What the runs in a directory have written, as ``MANIFEST_FILE`` holds it."""

    command: str | None  # None: a run of an earlier version
    names: Sequence[str]
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of folders that a run has completed
    finished: int | None = None  # steps of the last run that reached its end
    asked: int | None = None  # steps that it was asked for: more, where it stopped early
    run: str | None = None  # what its checkpoints are known by; None: an earlier version
    replaced: Sequence[str] = ()  # the same of runs that it has overwritten


def check_directory(directory: Path, wanted: Wanted, overwrite: bool) -> None:
    """Refuse an output directory that cannot be written or holds what would be lost. Changes nothing.

    Raises ``ValueError``.
    """
    with disk_errors(directory):
        _check_place(directory)
    check_config_files(directory)
    manifest = read_manifest(directory)
    _check_foreign(directory, wanted, manifest)
    if overwrite:
        return
    check_lines(directory)
    if manifest is None:
        return
    if manifest.command not in (None, wanted.command):
        raise ValueError(
            f"output_dir: found {directory}, which {manifest.command} has written; accepted for "
            f"{wanted.command}: {_WAYS_OUT}"
        )
    _check_finished(directory, manifest)
    _check_resumable(directory, wanted.checkpoint)


def read_manifest(directory: Path) -> Manifest | None:
    """What runs have written in ``directory``; None where it is no run's."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return _earlier_version(directory)
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(
            f"output_dir: found {path}, which is not as a run writes it; accepted: another output_dir"
        ) from None


def begin(directory: Path, wanted: Wanted, overwrite: bool, known_by: str | None = None) -> str:
    """Remove what runs wrote if ``overwrite`` says so, and write the manifest. The directory is locked.

    Returns what the run's checkpoints are known by: what the manifest says, or else ``known_by``, that of the
    checkpoint which it goes on from.
    """
    with disk_errors(directory):
        found = read_manifest(directory)
        replaced = [] if found is None else list(found.replaced)
        if found is not None and overwrite:
            _remove(directory, found)
            replaced += [] if found.run is None else [found.run]
            found = None
        old = [] if found is None else list(found.names)
        names = list(dict.fromkeys([*old, *wanted.names]))
        run = (None if found is None else found.run) or known_by or uuid.uuid4().hex
        files = {} if found is None else found.files
        _write(directory, Manifest(wanted.command, names, files, run=run, replaced=replaced))
        return run


def end(directory: Path, steps: int, asked: int | None = None) -> None:
    """Write down that the run has reached its end after ``steps``, and which files that gave.

    ``asked``: steps that it was asked for, where it may have stopped before.
    """
    found = read_manifest(directory)
    assert found is not None, "begin() comes first"
    folders = [directory / name for name in (EXPORT_FOLDER, ADAPTER_FOLDER, REPORT_FOLDER)]
    files = {folder.name: sorted(_inside(folder)) for folder in folders if folder.is_dir()}
    _write(directory, dataclasses.replace(found, files=files, finished=steps, asked=asked))


def forget_files(directory: Path, names: Collection[str]) -> None:
    """Take what the runs' ends wrote below ``names`` out of the manifest: it is about to be renamed."""
    found = read_manifest(directory)
    if found is not None and (directory / MANIFEST_FILE).is_file():
        files = {name: listed for name, listed in found.files.items() if name not in names}
        _write(directory, dataclasses.replace(found, files=files))


def _check_place(directory: Path) -> None:
    for path in (directory, *directory.parents):
        if path.exists() or path.is_symlink():
            break
    accepted = "accepted: a directory to write to, or the name of one to make"
    if not path.is_dir():
        what = "is a file" if path.exists() else "is a link to nothing"
        raise ValueError(f"output_dir: found {directory}, but {path} {what}; {accepted}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: found {directory}, but {path} is not writable; {accepted}")


def _check_foreign(directory: Path, wanted: Wanted, manifest: Manifest | None) -> None:
    """Raise ``ValueError`` for something else's file or folder under a name that the run writes."""
    ours = [] if manifest is None else manifest.names
    for name in wanted.names:
        path = directory / name
        if not (path.exists() or path.is_symlink()):
            continue
        if _is_of_another_run(path):
            raise ValueError(
                f"output_dir: found {path}, a link to {path.resolve()} of another run, which this run would "
                "change; accepted: a copy of it, or another output_dir"
            )
        right_kind = path.is_file() if name in RUN_FILES else path.is_dir()
        if name not in ours or not right_kind or not _looks_ours(path):
            raise _foreign(path)
    for name, files in ({} if manifest is None else manifest.files).items():
        others = sorted(_inside(directory / name) - {*files, MADE_BY}) if name in _EXPORTS else []
        if others:
            raise _foreign(directory / name / others[0])


def _is_of_another_run(path: Path) -> bool:
    """Whether ``path`` is a link to what lies in another run's directory."""
    return path.is_symlink() and (path.resolve().parent / MANIFEST_FILE).is_file()


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"output_dir: found {path}, which no run has written and which the run would replace; accepted: "
        "another output_dir, or move it"
    )


def _looks_ours(path: Path) -> bool:
    if path.name == METRICS_FILE:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline()
        # One without its end: killed while writing, or only begun.
        return not first.endswith("\n") or _keys(first) >= _METRICS_KEYS
    if path.name == SUMMARY_FILE:
        found = _keys(path.read_text(encoding="utf-8", errors="replace"))
        return any(keys <= found for keys in _SUMMARY_KEYS)
    return True


def _keys(text: str) -> set[str]:
    try:
        found = json.loads(text)
    except ValueError:
        return set()
    return set(found) if isinstance(found, dict) else set()


def _earlier_version(directory: Path) -> Manifest | None:
    """The manifest of a directory without one, where it looks like that of a run."""
    there = [name for name in (*RUN_FILES, *_FOLDERS) if (directory / name).exists()]
    told = [directory / name for name in (METRICS_FILE, SUMMARY_FILE)]
    if complete_steps(directory / CHECKPOINTS_FOLDER) or any(
        path.is_file() and path.stat().st_size and _looks_ours(path) for path in told
    ):
        return Manifest(None, there)
    return None


def _check_finished(directory: Path, manifest: Manifest) -> None:
    """Raise ``ValueError`` for a finished run that would be done again, in whole or in part."""
    steps = complete_steps(directory / CHECKPOINTS_FOLDER)
    results = [directory / name for name in (SUMMARY_FILE, EXPORT_FOLDER)]
    there = [path for path in results if path.name in manifest.names and path.exists()]
    whole = len(there) == 2 or (len(there) == 1 and EXPORT_FOLDER not in manifest.files)
    if steps and (manifest.finished is None or steps[-1] >= manifest.finished or not whole):
        return
    if not there:
        return
    newest = f"its newest checkpoint is that of step {steps[-1]}" if steps else "without a checkpoint"
    raise ValueError(
        f"output_dir: found {directory}, where a run has ended ({there[0].name}, {newest}); accepted: "
        f"{_WAYS_OUT}, or more steps where there is a checkpoint of the last one (checkpoint.save_final)"
    )


def _check_resumable(directory: Path, settings: CheckpointConfig) -> None:
    steps = complete_steps(directory / CHECKPOINTS_FOLDER)
    if steps and not settings.resume:
        raise ValueError(
            f"checkpoint.resume: found false, but {directory / CHECKPOINTS_FOLDER} has a checkpoint of step "
            f"{steps[-1]} from an earlier run; accepted: {_WAYS_OUT}, or true"
        )


def _remove(directory: Path, manifest: Manifest) -> None:
    """Remove what runs wrote; what lies beside it stays. Checkpoints go first: nothing resumes from half.

    The manifest stays until another is written: a kill in between loses none of the runs' names.
    """
    for path in parts_of(directory / CHECKPOINTS_FOLDER):
        if is_foreign(path, manifest.run):
            logger.warning(
                "%s is no checkpoint of this run: it is now %s", path, set_aside(path, "kept").name
            )
        else:
            remove_checkpoint(path)
    for path in [*_written(directory, manifest), *(directory / name for name in AUDIT_FILES)]:
        path.unlink(missing_ok=True)
    for folder in (*_FOLDERS, "audit"):
        _remove_empty(directory / folder)
    remove_config(directory)


def _written(directory: Path, manifest: Manifest) -> Iterator[Path]:
    """The files that runs wrote, checkpoints, audits and configurations aside."""
    yield from (directory / name for name in RUN_FILES if name in manifest.names)
    yield from directory.glob(CUT_LINES)
    if TENSORBOARD_FOLDER in manifest.names:
        yield from (directory / TENSORBOARD_FOLDER).glob("events.out.tfevents.*")
    # Without a list of files: a run of an earlier version, or one that was killed on its way.
    patterns = {
        EXPORT_FOLDER: ["**/*"],
        ADAPTER_FOLDER: ["adapter_*"],
        REPORT_FOLDER: ["index.html", "*.png"],
        RESPONSES_FOLDER: [RESPONSES_FILES],
    }
    for name, found in patterns.items():
        if name not in manifest.names:
            continue
        folder = directory / name
        if name in manifest.files:
            yield from (folder / file for file in manifest.files[name])
        else:
            yield from (path for pattern in found for path in folder.glob(pattern) if not path.is_dir())


def _remove_empty(folder: Path) -> None:
    if not folder.is_dir() or folder.is_symlink():
        return
    inner = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for path in [*sorted(inner, reverse=True), folder]:
        if not any(path.iterdir()):
            path.rmdir()


def _inside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _write(directory: Path, manifest: Manifest) -> None:
    about: dict[str, Any] = {
        "command": manifest.command,
        "names": list(manifest.names),
        "files": {name: list(files) for name, files in manifest.files.items()},
        "finished": manifest.finished,
        "asked": manifest.asked,
        "run": manifest.run,
        "replaced": list(manifest.replaced),
    }
    write_text(directory / MANIFEST_FILE, json.dumps(about, indent=1) + "\n")
