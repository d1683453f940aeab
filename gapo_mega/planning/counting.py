"""Goes through the parts of a pass with a counter of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A part of the model, in bytes.

    ``saved``: what it leaves for the backward. ``forward`` and ``backward``: what each needs at its peak
    above all that is held when it begins; ``forward`` includes the block's own ``saved``, ``backward`` not.
    """

    saved: int
    forward: int
    backward: int


class Counter:
    """Bytes held, and the most so far."""

    def __init__(self) -> None:
        self.held = 0
        self.peak = 0

    def touch(self, size: int) -> None:
        """Allocate ``size`` and free it."""
        self.peak = max(self.peak, self.held + size)

    def hold(self, size: int) -> None:
        """Allocate ``size``; free it if negative."""
        self.held += size
        self.touch(0)

    def forward(self, blocks: Sequence[Block]) -> None:
        """Go through ``blocks``."""
        for block in blocks:
            self.touch(block.forward)
            self.hold(block.saved)

    def backward(self, blocks: Sequence[Block], keep: bool = False) -> None:
        """Go back; ``keep`` the saved tensors for another backward."""
        for block in reversed(blocks):
            self.touch(block.backward)
            self.hold(0 if keep else -block.saved)
