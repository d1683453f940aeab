"""The folder of a run's checkpoints, and stopping in time to write one.

A checkpoint is a directory ``step_00000012``. It is written under a temporary name, flushed to the
disk, given the file ``complete.json`` and only then renamed. A process killed at any moment leaves
either a complete checkpoint or something that ``CheckpointFolder`` knows to be incomplete and
removes before it writes the next one. ``complete.json`` lists the files with their checksums. What is
called like a checkpoint without being one, or is damaged, is renamed and never removed.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import FrameType, MappingProxyType, TracebackType
from typing import Any

import torch

from gapo_mega.config import CheckpointConfig
from gapo_mega.engine.base import Layout, Ranks
from gapo_mega.evaluation.files import flush, write_data
from gapo_mega.models.checkpoint_files import FILES, MARKER, Listing
from gapo_mega.runs.checksums import checksums
from gapo_mega.runs.disk_space import check_checkpoint
from gapo_mega.runs.keeping import Keep
from gapo_mega.runs.processes import Alone, Peers, agree
from gapo_mega.scratch import size_of

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
RUN_ID = (
    "id"  # key of the record: the run that the checkpoint is of, beside others that were configured alike
)
UPDATES, RECORD = "updates", "run"  # keys of it: optimizer steps done, and what the checkpoint belongs to
BEST = "best"  # and the best evaluation by then, where the run chooses one
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".incomplete-"
_DISTRIBUTIONS = ("gapo-mega", "megatron-core", "torch")


class CheckpointFolder:
    """Names, finds, completes and removes the checkpoints below one directory.

    ``save`` is collective; only the main rank changes directories. All ranks must share the file
    system.
    """

    def __init__(
        self,
        directory: Path,
        keep: int | Keep,
        layout: Layout,
        barrier: Callable[[], None],
        everyone: Peers | None = None,
        least_bytes: int = 0,
    ) -> None:
        """``keep``: complete checkpoints that are kept; a number is a count. ``barrier``: for all ranks.

        ``everyone``: the ranks that share the reading for checksums; None: each is alone with it.
        ``least_bytes``: what a checkpoint is known to take.
        """
        self.directory = directory
        self._keep = Keep(keep) if isinstance(keep, int) else keep
        self._layout = layout
        self._barrier = barrier
        self._everyone = Alone() if everyone is None else everyone
        self._least_bytes = least_bytes

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies or would lie."""
        return checkpoint_path(self.directory, step)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        with _disk_errors(self.directory, "read"):
            return complete_steps(self.directory)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None where there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        about: Mapping[str, Any] | None = None,
        kept: Collection[int] = (),
    ) -> Path:
        """Write the checkpoint of ``step``; a complete one of the same step is replaced.

        Args:
            write: called on every rank with an existing empty directory; returns when this rank's
                part is written.
            about: what ``complete.json`` holds of the run, as JSON.
            kept: steps whose checkpoints stay however old they are.

        Raises OSError, naming the directory, when the disk refuses, and ``ValueError`` before anything is
        written where it has too little room.
        """
        temporary = self.prepare(step)
        write(temporary)
        return self.complete(step, temporary, about, kept)

    def prepare(self, step: int) -> Path:
        """Make an empty directory to write the checkpoint of ``step`` to; raises as ``save``."""
        temporary = self.directory / f"{_TEMPORARY}step_{step:08d}"
        if self._layout.is_main:
            with _disk_errors(self.directory, "written"):
                self._remove_incomplete()
        agree(self._everyone, lambda: self._check_space(step))
        if self._layout.is_main:
            with _disk_errors(self.directory, "written"):
                temporary.mkdir(parents=True)
        self._barrier()
        return temporary

    def complete(
        self,
        step: int,
        temporary: Path,
        about: Mapping[str, Any] | None = None,
        kept: Collection[int] = (),
        own: Listing = MappingProxyType({}),
    ) -> Path:
        """Give the checkpoint of ``step`` its name, and remove older ones; raises as ``save``.

        ``temporary``: where every rank has written its part. ``own``: checksums that this rank has taken.
        """
        final = self.path(step)
        self._barrier()
        with _disk_errors(self.directory, "read"):
            files = checksums(temporary, self._everyone, own)
        failure: OSError | None = None
        try:
            if self._layout.is_main:
                with _disk_errors(self.directory, "written"):
                    self._complete(temporary, final, step, {FILES: files, **(about or {})})
                    self._remove_old(kept, known_by=_run_id(about or {}))
        except OSError as error:
            failure = error
        told = self._everyone.gather(None if failure is None else str(failure))[0]
        self._barrier()
        if told is not None:  # on every rank, for all go on alike
            raise failure or OSError(told)
        return final

    def _check_space(self, step: int) -> None:
        if self._layout.is_main:
            newest = self.latest()
            needed = max(self._least_bytes, 0 if newest is None else size_of(newest))
            check_checkpoint(self.directory, step, needed, newest)

    def _complete(self, temporary: Path, final: Path, step: int, more: Mapping[str, Any]) -> None:
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        sizes = {name: getattr(self._layout, name) for name in ("world", "tensor", "pipeline", "data")}
        about = {"step": step, "layout": sizes, "versions": {name: version(name) for name in _DISTRIBUTIONS}}
        write_data(temporary / MARKER, json.dumps({**about, **more}, indent=1) + "\n")
        flush(temporary)
        if final.exists():
            replaced = self.directory / f"{_TEMPORARY}replaced"
            final.rename(replaced)
            temporary.rename(final)
            _remove_tree(replaced)
        else:
            temporary.rename(final)
        flush(self.directory)

    def _remove_old(self, kept: Collection[int], known_by: str | None) -> None:
        """Remove this run's older checkpoints, as far as ``keep`` says."""
        mine = [step for step in self.steps() if not is_foreign(self.path(step), known_by)]
        for step in self._keep.surplus(mine, lambda step: size_of(self.path(step))):
            if step not in kept:
                remove_checkpoint(self.path(step))
                logger.info("removed checkpoint %s (%s)", self.path(step), self._keep)

    def _remove_incomplete(self) -> None:
        for path in incomplete_parts(self.directory):
            _remove_tree(path)
        for path in named_parts(self.directory):
            if _complete_step(path) is None:
                logger.warning("%s is no complete checkpoint: it is now %s", path, set_aside(path).name)


def complete_steps(directory: Path) -> list[int]:
    """The steps of all complete checkpoints in ``directory``, ascending; none where it is not there."""
    return sorted(step for path in parts_of(directory) if (step := _complete_step(path)) is not None)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where in ``directory`` the checkpoint of ``step`` lies or would lie."""
    return directory / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("_")[2])


def parts_of(directory: Path) -> list[Path]:
    """The checkpoints in ``directory``, complete or not."""
    if not directory.is_dir():
        return []
    return [
        path
        for path in directory.iterdir()
        if path.is_dir() and (path.name.startswith(_TEMPORARY) or _NAME.fullmatch(path.name))
    ]


def incomplete_parts(directory: Path) -> list[Path]:
    """What was not finished in ``directory``, be it writing or removing."""
    return [path for path in parts_of(directory) if path.name.startswith(_TEMPORARY)]


def named_parts(directory: Path) -> list[Path]:
    """What is called like a checkpoint in ``directory``, whether it is one or not."""
    return [path for path in parts_of(directory) if _NAME.fullmatch(path.name)]


def set_aside(path: Path, what: str = "damaged") -> Path:
    """Rename a checkpoint so that nothing takes it for one, and return its new path. Nothing is deleted."""
    names = (path.with_name(f"{path.name}.{what}-{number}") for number in count(1))
    return path.rename(next(name for name in names if not (name.exists() or name.is_symlink())))


def marker_of(checkpoint: Path) -> dict[str, Any]:
    """What ``complete.json`` of ``checkpoint`` holds; empty where it is missing or cut off."""
    marker = checkpoint / MARKER
    try:
        found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def is_foreign(path: Path, known_by: str | None) -> bool:
    """Whether the run that is ``known_by`` cannot have made the checkpoint at ``path``, and must leave it.

    Checkpoints of versions that write no ``id`` count as the run's own, and so does a link, which goes alone.
    """
    if path.is_symlink() or path.name.startswith(_TEMPORARY):
        return False
    marker = marker_of(path)
    return not marker or (known_by is not None and _run_id(marker) not in (None, known_by))


def _run_id(about: Mapping[str, Any]) -> str | None:
    record = about.get(RECORD)
    found = record.get(RUN_ID) if isinstance(record, dict) else None
    return found if isinstance(found, str) else None


def check_updates(checkpoint: Path, updates_per_step: int) -> None:
    """Raise ``ValueError`` unless ``checkpoint`` has done ``updates_per_step`` optimizer steps a step.

    The log is cut where the checkpoint ends.
    """
    marker = marker_of(checkpoint)
    mine = int(marker["step"]) * updates_per_step
    if marker.get(UPDATES, mine) != mine:
        raise ValueError(
            f"output_dir: {checkpoint} has done {marker[UPDATES]} optimizer steps in {marker['step']} steps, "
            f"this run would have done {mine}; accepted: the configuration of the run that is resumed, or "
            "another output_dir"
        )


def _complete_step(path: Path) -> int | None:
    """The step of a complete checkpoint directory, None for everything else."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    step = int(match.group(1))
    return step if marker_of(path).get("step") == step else None


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, complete or not; of one that is a link, only the link: it is another run's."""
    if not path.is_symlink() and not path.name.startswith(_TEMPORARY):
        # First out of sight: if the process is killed halfway, the rest is known to be incomplete.
        hidden = path.with_name(f"{_TEMPORARY}removed-{path.name}")
        if hidden.exists():
            _remove_tree(hidden)
        path = path.rename(hidden)
    _remove_tree(path)


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


@contextmanager
def _disk_errors(directory: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"checkpoints in {directory} cannot be {what}: {error}") from error


def is_due(settings: CheckpointConfig, step: int, last: bool) -> bool:
    """Whether to write a checkpoint after ``step``; with ``every_steps`` always after the last."""
    if last:
        return bool(settings.every_steps or settings.save_final)
    return bool(settings.every_steps) and step % settings.every_steps == 0


def any_replica(ranks: Ranks, requested: bool) -> bool:
    """Whether the first rank of any replica was asked to stop; the same on every rank."""
    first = ranks.broadcast_in_replica(requested)
    return bool(ranks.sum_over_data(torch.tensor(int(first))))


def checkpoint_to_resume(folder: CheckpointFolder, settings: CheckpointConfig, ranks: Ranks) -> Path | None:
    """The newest complete checkpoint, on which all ranks agree; None where there is none.

    Raises ``ValueError`` where ranks see different ones, and where there is one but the run asks for none.
    """
    latest = folder.latest()
    found = ranks.gather_over_data(ranks.broadcast_in_replica(latest))
    if any(other != latest for other in found):
        raise ValueError(
            f"output_dir: ranks see different checkpoints in {folder.directory.parent} ({latest}, {found}); "
            "accepted: a directory that all nodes share"
        )
    if latest is not None and not settings.resume:
        raise ValueError(
            f"checkpoint.resume: found false, but {latest} is there from an earlier run; "
            "accepted: true, --overwrite, another output_dir"
        )
    return latest


class StopOnSignal:
    """Inside the context SIGTERM, SIGHUP, and SIGINT the first time, only set ``requested``.

    The training loop looks at it between steps, writes a checkpoint and ends. A second SIGINT acts as
    outside the context. SIGHUP stays ignored where it is, as under nohup. Enter it in the main thread: Python
    handles signals there alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._request)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in list(self._previous):
            self._restore(number)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            self._restore(signal.SIGINT)

    def _restore(self, number: signal.Signals) -> None:
        if number in self._previous:
            previous = self._previous.pop(number)
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
