"""What torch's checkpoint functions failed with: they wrap whatever a rank raised, and Ctrl-C as well."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


def cause_in_words(error: CheckpointException) -> str:
    """The first failed rank and the reason, as in ``rank 1: disk full``; see ``first_cause``."""
    rank, cause = first_cause(error)
    return f"rank {rank}: {str(cause) or type(cause).__name__}"


def first_cause(error: CheckpointException) -> tuple[int, BaseException]:
    """The first failed rank, and what it raised.

    Raises ``KeyboardInterrupt`` where this process itself got it: nothing has failed then.
    """
    own = dist.get_rank() if dist.is_initialized() else 0
    causes = {rank: cause for rank, (cause, _) in error.failures.items()}
    if isinstance(causes.get(own), KeyboardInterrupt):
        raise KeyboardInterrupt from error
    return next(iter(causes.items()))


class Files(FileSystemWriter):
    """Torch's writer, one file a rank, out of which Ctrl-C comes as it is."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As torch's."""
        with interrupts():
            return super().write_data(plan, planner)


@contextmanager
def interrupts() -> Iterator[None]:
    """Let Ctrl-C in the block be ``KeyboardInterrupt``.

    ``torch.save`` closes the archive that it has not finished, and that fails with an error of its own. Once
    ranks exchange it, nothing of it says that it began with Ctrl-C.
    """
    before = sys.exc_info()[1]
    try:
        yield
    except Exception as error:
        cause = error.__context__
        while cause is not None and cause is not before:
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            cause = cause.__context__
        raise
