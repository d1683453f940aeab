"""Signs of life between the ranks of a job, so that no rank waits for one that will not come.

Every rank writes where it is into the job's store, from a thread of its own: a slow reward or a long
compilation does not silence it. Rank 0 watches all, the others watch rank 0, and all watch the store. Who is
silent for too long is lost: a rank that finds one says so, tells the others, and ends its process.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from gapo_mega.planning.world import ranks_in_words
from gapo_mega.whereabouts import PEERS_LOST, Place, here

logger = logging.getLogger(__name__)

_SIGNS = 10  # of life within the time after which a rank is lost
_FASTEST, _SLOWEST = 0.2, 5.0  # seconds between two of them
_TO_LEAVE = 60.0  # seconds that a rank has to end by itself after another one has told of a loss
_TO_TELL = 3.0  # seconds that the store has to take the last words of a process
_SHOWN = 4  # ranks in a message
_LOST = "lost"


@dataclass(frozen=True)
class Sign:
    """What a rank last wrote: how often it has written, where it is, and whether it has ended."""

    count: int
    host: str
    process: int
    place: Place
    ended: bool = False

    def encoded(self) -> str:
        place = [self.place.step, self.place.phase, self.place.since]
        return json.dumps([self.count, self.host, self.process, place, self.ended])

    @classmethod
    def decoded(cls, text: bytes | str) -> Sign:
        count, host, process, place, ended = json.loads(text)
        return cls(count, host, process, Place(*place), ended)

    def told(self, rank: int) -> str:
        """The rank in words."""
        since = time.strftime("%H:%M:%S", time.localtime(self.place.since))
        where = "has ended" if self.ended else f"is in {self.place} since {since}"
        return f"rank {rank} (host {self.host}, process {self.process}) {where}"


def end_process(message: str) -> None:
    """End this process at once, whatever its main thread waits for."""
    logger.error("%s", message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(PEERS_LOST)


class Watch:
    """Gives this rank's signs of life and watches for those of others, from ``start`` to ``stop``."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        silence: timedelta,
        end: Callable[[str], None] = end_process,
        to_leave: float = _TO_LEAVE,
    ) -> None:
        """``store``: of the job; the watch talks to it through a connection of its own.

        ``silence``: after which a rank, or the store, is lost. ``end`` ends the process, told why, also
        where it has not ended by itself ``to_leave`` seconds after another rank has told of a loss.
        """
        self._store = store.clone()
        self._asking = store.clone()  # not blocked where the other one is
        self._rank, self._size = rank, size
        self._others = [other for other in range(size) if other != rank]
        self._limit = silence.total_seconds()
        self._period = min(max(self._limit / _SIGNS, _FASTEST), _SLOWEST)
        self._to_hear = 2 * self._period  # by then all that live have looked
        self._end = end
        self._to_leave = to_leave
        self._leaving = False  # the main thread has found out by itself
        self._watched = self._others if rank == 0 else [0]
        self._signs: dict[int, Sign] = {}
        self._heard: dict[int, float] = {}  # time.monotonic() of the last new sign
        self._answered = time.monotonic()  # of the store's last answer
        self._count = 0
        self._told: str | None = None  # what other ranks say is lost
        self._last_words: str | None = None
        self._finding: str | None = None
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    # -- its life ------------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin. A rank that has not given a sign yet counts from now on."""
        self._give_sign()
        self._answered = time.monotonic()
        self._heard = dict.fromkeys(self._watched, self._answered)
        for work in (self._keep_in_touch, self._judge):
            thread = threading.Thread(target=work, name=f"gapo-mega {work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, reason: str | None = None) -> None:
        """End; ``reason``: the error that ends this process, for ranks that would wait for it."""
        self._last_words = reason
        self._stopping.set()
        for thread in self._threads:
            thread.join(_TO_TELL + self._to_hear)

    # -- in touch with the store, which may block ----------------------------------------------------
    def _keep_in_touch(self) -> None:
        while not self._stopping.wait(self._period):
            try:
                self._give_sign()
                self._look()
            except RuntimeError as error:  # its host has gone, or the link: the other thread counts the time
                logger.debug("the job's store does not answer: %s", error)
        try:
            if self._last_words is not None:
                self._store.compare_set(_LOST, "", self._last_words)
            self._give_sign(ended=True)
            self._store.set(_heard(self._rank), "")  # who has ended need not hear
            if self._last_words is not None and self._rank == 0:  # whose process may hold the store
                heard = [_heard(rank) for rank in self._others]
                self._store.wait(heard, timedelta(seconds=self._to_hear))
        except RuntimeError as error:
            logger.debug("the job's store has not taken the last words: %s", error)

    def _give_sign(self, ended: bool = False) -> None:
        self._count += 1
        sign = Sign(self._count, socket.gethostname(), os.getpid(), here(), ended)
        self._store.set(_key(self._rank), sign.encoded())

    def _look(self) -> None:
        if self._store.check([_LOST]):
            self._told = self._store.get(_LOST).decode()
            self._store.set(_heard(self._rank), "")
        for rank, sign in self._read(self._store, self._watched).items():
            if rank not in self._signs or sign.count != self._signs[rank].count:
                self._heard[rank] = time.monotonic()
            self._signs[rank] = sign
        self._answered = time.monotonic()

    def _read(self, store: Any, ranks: Sequence[int]) -> dict[int, Sign]:
        if store.check([_key(rank) for rank in ranks]):
            there = list(ranks)
        else:  # some have not begun yet
            there = [rank for rank in ranks if store.check([_key(rank)])]
        found = store.multi_get([_key(rank) for rank in there]) if there else []
        return {rank: Sign.decoded(text) for rank, text in zip(there, found, strict=True)}

    # -- judging, which never blocks -----------------------------------------------------------------
    def _judge(self) -> None:
        last, told_at = time.monotonic(), None
        while not self._stopping.wait(self._period / 2) and not self._leaving:
            now = time.monotonic()
            if now - last > 2 * self._period:
                # This process was stopped, or one call held it all the time: nobody could have been heard.
                self._forgive(now)
            last = now
            if self._told is not None:  # silence is no news any more
                told_at = told_at or now
                if now - told_at > self._to_leave:
                    self._end(f"rank {self._rank} ends, because another rank did: {self._told}")
                    return
                continue
            finding = self._lost(now)
            if finding is not None:
                self.leave(finding)
                return

    def _forgive(self, now: float) -> None:
        self._answered = now
        self._heard = dict.fromkeys(self._heard, now)

    def _lost(self, now: float) -> str | None:
        """Who has been silent for too long, in one line; None: nobody."""
        silent = [
            rank
            for rank, heard in list(self._heard.items())
            if now - heard > self._limit and not (rank in self._signs and self._signs[rank].ended)
        ]
        if now - self._answered > self._limit:
            about, silent = f"the job's store, and with it {ranks_in_words(self._watched)}", self._watched
        elif silent:
            about = ranks_in_words(silent)
        else:
            return None
        last = "; ".join(self._signs[r].told(r) for r in silent[:_SHOWN] if r in self._signs)
        return (
            f"rank {self._rank} on {socket.gethostname()}, in {here()}, has not heard of {about} for "
            f"{self._limit:g} s (parallel.silence_minutes)" + (f"; last heard: {last}" if last else "")
        )

    def leave(self, finding: str) -> None:
        """Tell the others what is wrong, and end this process."""
        self._last_words = finding
        self._stopping.set()
        self._threads[0].join(_TO_TELL + self._to_hear)
        self._end(f"{finding}; this process ends")

    # -- explaining ----------------------------------------------------------------------------------
    def explain(self, error: Exception, place: Place) -> str:
        """In one line: where this rank waited, for how long, what went wrong, and where the others are.

        The process ends by itself from here on, and takes the time that it needs.
        """
        self._leaving = True
        waited = time.time() - place.since
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        others = self._last_seen()
        behind = sorted(others, key=lambda rank: (others[rank].place.step, others[rank].place.since))
        told = "; ".join(others[rank].told(rank) for rank in behind[:_SHOWN])
        unheard = sorted(set(self._others) - set(others))
        if unheard:
            told = f"{told}{'; ' if told else ''}nothing is known of {ranks_in_words(unheard)}"
        cause = f"; {self._told}" if self._told else ""
        return (
            f"rank {self._rank} on {socket.gethostname()} lost the others {waited:.0f} s into {place} "
            f"({reason}): {told}{cause}"
        )

    def _last_seen(self) -> dict[int, Sign]:
        """The others' last signs, as far as the store tells them in time."""
        found = dict(self._signs)

        def ask() -> None:
            try:
                if self._asking.check([_LOST]):
                    self._told = self._asking.get(_LOST).decode()
                found.update(self._read(self._asking, self._others))
            except RuntimeError as error:
                logger.debug("the job's store does not answer: %s", error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_TO_TELL)
        return dict(found)


def _key(rank: int) -> str:
    return f"sign/{rank}"


def _heard(rank: int) -> str:
    return f"heard/{rank}"
