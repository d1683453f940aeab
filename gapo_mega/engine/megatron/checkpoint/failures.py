"""What torch's checkpoint functions failed with: they wrap whatever a rank raised, and Ctrl-C as well."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException


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
