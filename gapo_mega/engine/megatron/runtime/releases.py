"""What differs between the releases of Megatron-core that this package accepts, told by what is there.

``gapo_mega/versions.py`` says which releases the tests have run with.

- From 0.19 on ``dist_checkpointing.save`` makes one more sharded object of what is not sharded, which older
  releases do not know: before, it was in ``common.pt``, which all of them read.
- From 0.17 on ``dist_checkpointing.save`` silently takes its own strategy in place of any that is not a
  subclass of it. 0.16 wants a ``SaveShardedStrategy``, a class that 0.19 has not.
  ``TorchDistSaveShardedStrategy`` is both.
- From 0.19 on the reduction of gradients asks for ``torch.cuda.current_stream``; ``cpu.py`` answers it.
- Later releases warn of what this package does on purpose: ``without_advice``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as version_of
from typing import Any

_COMMON = "common_state"  # the key of what is not sharded, where it is a sharded object
_ADVISERS = (
    # The model is a GPTModel.
    "megatron.core.models.gpt.gpt_model",
    # The layout of the buffers is left to Megatron.
    "megatron.core.distributed.distributed_data_parallel",
    # Checkpoints have a common.pt.
    "megatron.core.dist_checkpointing.strategies.common",
)


def version() -> str:
    """The installed release."""
    return version_of("megatron-core")


def take_common(sharded_state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Take what is not sharded out of the state that a save strategy gets.

    None where the release has written it into ``common.pt`` itself.
    """
    entry = sharded_state_dict.pop(_COMMON, None)
    return None if entry is None else entry.data


@contextmanager
def errors_only(*loggers: str) -> Iterator[None]:
    """Silence the warnings of these loggers."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def without_advice() -> Iterator[None]:
    """Silence the warnings of newer releases about what this package does on purpose."""
    with errors_only(*_ADVISERS):
        yield
