"""What this process is doing, for the ranks that wait for it: its step, its phase, and since when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

PEERS_LOST = 76  # exit code of a rank that has lost the others (EX_PROTOCOL)


class LostPeersError(RuntimeError):
    """Other ranks do not answer any more. The message is one line, and names them as far as that is known."""


@dataclass(frozen=True)
class Place:
    """Where a process is.

    Attributes:
        step: the one under way, from 1; 0 outside of steps.
        phase: what is done there, in a word or two.
        since: when the phase began, in seconds of ``time.time``.
    """

    step: int
    phase: str
    since: float

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


START = "start"  # the phase of a process before a run has any
_places = [Place(0, START, time.time())]  # one; any thread may read it
_moves = [0]  # one; any thread may read it


def here() -> Place:
    """Where this process is now; after an error, where that was raised."""
    return _places[0]


def get_on() -> None:
    """Note that the phase goes on: a token, a microbatch, a file, another look at what is waited for."""
    _moves[0] += 1


def enter(phase: str, step: int = 0) -> None:
    """Be in ``phase`` of ``step`` from now on."""
    get_on()
    _places[0] = Place(step, phase, time.time())


def passed(lap: str) -> None:
    """Note that a part of the phase is done: the phase is what follows ``lap`` from now on."""
    get_on()
    _places[0] = replace(here(), phase=f"{here().phase.split(' after ')[0]} after {lap}", since=time.time())


@contextmanager
def within(phase: str) -> Iterator[None]:
    """Be in ``phase`` within the block, and then where the process was before.

    An error leaves the process where it is, so that whoever catches it can tell where it came from.
    """
    outer = here()
    enter(phase, outer.step)
    yield
    get_on()
    _places[0] = outer


def moves() -> int:
    """How often this process has noted that it gets on."""
    return _moves[0]
