"""Where the processes of a job meet: one store for each attempt, whatever earlier attempts left behind.

The store of torchrun's agents outlives a restart of their workers, with the addresses of dead processes in
it, and agents count restarts each for itself. So the living agree on a number that nobody else has: every
rank says hello with a token of its own, rank 0 offers a number for the tokens that it sees, and once all of
these ranks have taken the offer, they use the store under that number.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from gapo_mega.planning.world import World, did_not_meet, ranks_in_words, waiting_for

# Torchrun starts workers once all nodes are there; what is left is the time that imports differ by.
STARTED_TOGETHER = timedelta(minutes=10)
_FIRST_LOOK, _LAST_LOOK = 0.02, 0.5  # seconds between looks, which double


@dataclass(frozen=True)
class Meeting:
    """Where the processes of this attempt have met.

    Attributes:
        store: theirs alone.
        lasting: that of all attempts, as far as torchrun's agents keep it.
    """

    store: Store
    lasting: Store


_met: dict[World, Meeting] = {}


def meet(world: World, limit: timedelta, logger: logging.Logger) -> Meeting:
    """Meet the other processes; a process does so once, and then has the same stores.

    ``limit``: how long to wait for them at most; less where torchrun has started all. ``logger`` is told
    beforehand where it has not. Raises ``ValueError`` naming who is missing.
    """
    if world in _met:
        return _met[world]
    patience = limit
    if dist.is_torchelastic_launched():
        patience = min(limit, STARTED_TOGETHER)
    else:
        logger.warning("%s", waiting_for(world, patience))
    try:
        store = _connect(world, patience)
        number = _Handshake(PrefixStore("gapo-mega", store), world, patience).number()
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        raise ValueError(did_not_meet(world, error, patience)) from error
    store.set_timeout(limit)
    _met[world] = Meeting(PrefixStore(f"gapo-mega/{number}", store), PrefixStore("gapo-mega/lasting", store))
    return _met[world]


def _connect(world: World, patience: timedelta) -> Store:
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://", timeout=patience))[0]
    return store


@dataclass
class _Handshake:
    store: Store
    world: World
    patience: timedelta

    def number(self) -> str:
        """The number on which the living ranks agree. Raises ``TimeoutError`` naming who is missing."""
        token = secrets.token_hex(8)
        self._end = time.monotonic() + self.patience.total_seconds()
        self._pause = _FIRST_LOOK
        self.store.set(f"hello/{self.world.rank}", token)
        return self._offer() if self.world.rank == 0 else self._take(token)

    def _offer(self) -> str:
        ranks = range(self.world.size)
        hellos = [f"hello/{rank}" for rank in ranks]
        offered: list[str] = []
        number = ""
        while True:
            if self.store.check(hellos):
                tokens = [token.decode() for token in self.store.multi_get(hellos)]
                if tokens != offered:  # a rank has come, or has been started again
                    offered, number = tokens, secrets.token_hex(8)
                    self.store.set("offer", json.dumps([number, tokens]))
                if self.store.check([f"taken/{number}/{rank}" for rank in ranks if rank]):
                    self.store.set(f"agreed/{number}", "")
                    return number
            self._wait([_answer(number, rank) for rank in ranks])

    def _take(self, token: str) -> str:
        taken = ""
        while True:
            if self.store.check(["offer"]):
                number, tokens = json.loads(self.store.get("offer"))
                if len(tokens) == self.world.size and tokens[self.world.rank] == token:
                    if number != taken:
                        taken = number
                        self.store.set(_answer(number, self.world.rank), "")
                    if self.store.check([f"agreed/{number}"]):
                        return str(number)
            self._wait([])

    def _wait(self, answers: list[str]) -> None:
        """``answers``: the keys that rank 0 waits for, one a rank."""
        if time.monotonic() > self._end:
            missing = [0]
            if self.world.rank == 0:
                missing = [rank for rank, key in enumerate(answers) if rank and not self.store.check([key])]
            raise TimeoutError(f"no answer from {ranks_in_words(missing)}")
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LAST_LOOK)


def _answer(number: str, rank: int) -> str:
    """The key by which a rank takes an offer, or comes at all where none was made yet."""
    return f"taken/{number}/{rank}" if number else f"hello/{rank}"
