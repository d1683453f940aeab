"""What benchmarks/peers.py asks its processes for. Imports nothing heavy: the starting process uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from peer_entries import Entry

Task = Literal["look", "allocated", "resident", "time"]


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the random Llama that is made where no model is named, in elements."""

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 8192
    feed_forward: int = 1376
    heads: int = 8


@dataclass(frozen=True)
class Order:
    """Model and batch to prepare, as files in ``folder``. ``model``: a directory; None: a random one."""

    folder: str
    model: str | None
    size: ModelSize
    sequences: int
    length: int
    objectives: int
    attention: str
    threads: int


@dataclass(frozen=True)
class Job:
    """A contender to measure. ``scopes``: those that ``Contender.look`` covers."""

    entry: Entry
    objectives: int
    source: str
    batch: str  # file
    threads: int
    attention: str
    microbatches: int
    scopes: tuple[Any, ...] = ()
