"""Writing a checkpoint's files while training goes on.

``FileSystemWriter`` of torch is taken apart: the plan is made at once, by all ranks; every rank copies to the
host what it has to write; a thread of its own writes it, and talks to no other rank; and all ranks make one
checkpoint of the files when every thread is done. So no collective runs beside those of the training, on
gloo as on NCCL.

Megatron's own asynchronous save (``AsyncCallsQueue``) does not serve here. It forks the training process,
where CUDA's and gloo's threads run, or starts another one that imports the user's script once more, and its
ranks ask each other by an all-reduce on a CUDA device whether they are done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gapo_mega.models.checkpoint_files import Listing, measured


class HeldFiles(FileSystemWriter):
    """Holds what it is given to write, as it is then, until ``write`` and ``complete``."""

    def __init__(self, directory: Path) -> None:
        # Without copying ahead: what is held is on the host.
        super().__init__(directory, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
        self._held: tuple[SavePlan, _Copies] | None = None
        self._metadata: Metadata | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy to the host what ``plan`` has of this rank."""
        self._held = plan, _Copies(plan, planner)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 alone."""
        self._metadata = metadata

    def write(self) -> list[WriteResult]:
        """Write this rank's files. Not collective. Raises what the disk says."""
        assert self._held is not None, "write_data() comes first"
        (plan, copies), self._held = self._held, None  # freed as soon as they are written
        return super().write_data(plan, copies).wait()

    def complete(self, results: list[list[WriteResult]]) -> None:
        """Write the index of all ranks' files; on rank 0 alone."""
        assert self._metadata is not None, "rank 0 made the plan"
        super().finish(self._metadata, results)


class _Copies(DefaultSavePlanner):
    """Gives a writer the data of a plan as they were when this was made."""

    def __init__(self, plan: SavePlan, planner: SavePlanner) -> None:
        super().__init__()
        self._data = {item.index: _copy(item, planner) for item in plan.items}
        assert len(self._data) == len(plan.items), "two items of a plan have one place"
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies are queued

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._data[write_item.index]


def _copy(item: WriteItem, planner: SavePlanner) -> Any:
    value = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        return value  # pickled just now
    assert isinstance(value, Tensor)
    # Pinned memory is kept for the next time, and is copied to without waiting.
    host = torch.empty_like(
        value, device="cpu", pin_memory=value.is_cuda, memory_format=torch.contiguous_format
    )
    return host.copy_(value.detach(), non_blocking=True)


class BackgroundSave:
    """The ``BackgroundSave`` of ``engine/base.py``: this rank's thread, and what ranks make of all files."""

    def __init__(self, directory: Path, held: HeldFiles, everywhere: Callable[[bool], bool]) -> None:
        """Begin to write. ``everywhere``: whether something holds on all ranks; collective."""
        self._directory = directory
        self._writer = held
        self._everywhere = everywhere
        self._results: list[WriteResult] = []
        self._files: Listing = {}
        self._error: str | None = None
        # A daemon: a process that has to end does not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._write, name="gapo-mega checkpoint", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            self._results = self._writer.write()
            own = sorted({result.storage_data.relative_path for result in self._results})
            self._files = {name: measured(self._directory / name) for name in own}
        except Exception as error:  # told by ``finish``, in the thread that trains
            self._error = _one_line(error)

    def is_done(self) -> bool:
        return self._everywhere(not self._thread.is_alive())

    def wait(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return self.is_done()

    def finish(self) -> Listing:
        late = None if not self._thread.is_alive() else "its files are not written yet"
        self._agree(self._error or late)
        world = dist.get_world_size()
        everyone: list[list[WriteResult]] | None = (
            [[] for _ in range(world)] if dist.get_rank() == 0 else None
        )
        dist.gather_object(self._results, everyone, dst=0)
        error = None
        if everyone is not None:
            try:
                self._writer.complete(everyone)
            except Exception as found:  # every rank has to hear of it
                error = _one_line(found)
        self._agree(error)
        return self._files

    def _agree(self, error: str | None) -> None:
        """Raise ``OSError`` on every rank where one has an ``error``. Collective."""
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        for rank, found in enumerate(errors):
            if found is not None:
                raise OSError(f"checkpoint {self._directory} cannot be written (rank {rank}): {found}")


def _one_line(error: Exception) -> str:
    """Torch adds lines of C++ to what a disk says."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
