"""What is done to runs, drawn at random from a seed: where, to whom, with which signal, and how often."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from itertools import product
from typing import Any

from tests.helpers.kills.phases import BY_NAME, first

SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
TARGETS = ("rank", "ranks", "launcher", "all")  # one of them, all of them, who started them, everybody
STARTS = ("forked", "command")


@dataclass(frozen=True)
class Layout:
    """Processes of a run; ``nproc`` 0: one process that nobody has started.

    ``background``: checkpoints are written while it trains (``checkpoint.asynchronous``).
    """

    name: str
    nproc: int
    weight: int  # how often it is drawn
    background: bool = False

    @property
    def ranks(self) -> int:
        return max(1, self.nproc)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("alone", 0, 3),
        Layout("1", 1, 2),
        Layout("2", 2, 3),
        Layout("4", 4, 2),
        Layout("alone-background", 0, 1, background=True),
        Layout("2-background", 2, 2, background=True),
    )
}
# Of each number of ranks: data ranks, and data ranks of two tensor ranks.
PARALLEL: dict[str, dict[str, Any]] = {"4": {"tensor": 2}}


@dataclass(frozen=True)
class Kill:
    """One disturbance. ``which`` and ``how_far`` are shares, of the phase's occurrences and its events.

    Attributes:
        victim: the rank that is hit where one is.
        observed: the rank whose place counts.
        again: seconds after which the signal comes a second time; None: it does not.
    """

    phase: str
    signal: str
    target: str
    victim: int
    observed: int
    which: float
    how_far: float
    again: float | None

    @property
    def number(self) -> signal.Signals:
        return signal.Signals[self.signal]

    @property
    def told(self) -> str:
        """The signal in the table."""
        return self.signal if self.again is None else f"{self.signal} twice"


@dataclass(frozen=True)
class Case:
    """A run that is disturbed once, or once more when it has been started again, and then ends."""

    number: int
    layout: str
    start: str
    kills: tuple[Kill, ...]


def draw(seed: int, number: int, layouts: tuple[str, ...], start: str, again: float = 0.25) -> Case:
    """Case ``number`` (from 0) of a seed: every pair of a first phase and a signal is met in turn.

    ``again``: share of the runs that are disturbed once more.
    """
    pairs = list(product(first(any(LAYOUTS[name].background for name in layouts)), SIGNALS))
    block, place = divmod(number, len(pairs))
    random.Random(f"order {seed} {block}").shuffle(pairs)
    rng = random.Random(f"case {seed} {number}")
    phase, sent = pairs[place]
    having = [name for name in layouts if phase in first(LAYOUTS[name].background)]
    (name,) = rng.choices(having, [LAYOUTS[layout].weight for layout in having])
    layout = LAYOUTS[name]
    kills = [_kill(rng, layout, phase, sent)]
    if rng.random() < again:
        phase = "resume" if rng.random() < 0.3 else rng.choice(first(layout.background))
        kills.append(_kill(rng, layout, phase, rng.choice(SIGNALS)))
    return Case(number, name, start, tuple(kills))


def _kill(rng: random.Random, layout: Layout, phase: str, name: str) -> Kill:
    target = rng.choice(TARGETS) if layout.nproc else "rank"
    victim = rng.randrange(layout.ranks)
    observed = 0 if BY_NAME[phase].main_only else victim
    twice = name != "SIGKILL" and rng.random() < (0.5 if name == "SIGINT" else 0.25)
    which, how_far, pause = rng.random(), rng.random(), rng.choice([0.05, 0.3, 1.0])
    return Kill(phase, name, target, victim, observed, which, how_far, pause if twice else None)
