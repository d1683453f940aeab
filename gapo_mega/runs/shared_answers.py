"""Held-out answers before training, shared by runs that begin alike: a sweep answers once a seed.

A file's name is a digest of all that the answers follow from: weights, rows, template, sampling, objectives,
seed, layout. Whoever has the same digest has the same answers, whatever it trains with afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gapo_mega.config.results import EVERY_STEPS, WITHOUT_EFFECT
from gapo_mega.evaluation.files import flush
from gapo_mega.files import local
from gapo_mega.rollout.heldout import Answers
from gapo_mega.runs.identity import TOTAL_UPDATES
from gapo_mega.runs.lock import disk_errors
from gapo_mega.runs.processes import Peers, agree
from gapo_mega.scratch import tell_removed

logger = logging.getLogger(__name__)

PARAMETER = "evaluation.shared"
_OWN = re.compile(r"\.(?P<host>.+)\.(?P<process>[1-9][0-9]{0,8})\.[0-9a-f]{32}\.json")
_QUIET = 3600.0  # seconds after which nobody still writes a file, on whatever host
# Settings that begin to matter with the first update, and places of what counts by its contents.
_LATER = (
    *("output_dir", "steps", TOTAL_UPDATES, "model.path", *WITHOUT_EFFECT),
    *("checkpoint.best", EVERY_STEPS, "evaluation.early_stopping_patience"),
    *(
        "aggregation.",
        "scalarization.",
        "advantages.",
        "loss.",
        "algorithm.",
        "optimizer.",
        "critic.",
        "gradients.",
    ),
)


class SharedAnswers:
    """The answers of one digest: those that were there, or those that this run makes and leaves."""

    def __init__(self, directory: str, record: Mapping[str, Any], world: int, everyone: Peers) -> None:
        """Look for the answers; every rank gets what rank 0 sees.

        Args:
            directory: where they are kept; made if need be.
            record: ``settings`` and ``contents`` of the run's ``Identity``.
            world: processes of the run.
            everyone: the run's ranks.
        """
        self._path = local(directory) / f"{digest(record, world)}.json"
        self._is_main = everyone.is_main
        seen: list[Answers | None] = [None]

        def look() -> None:
            if everyone.is_main:
                with disk_errors(self._path.parent, PARAMETER):
                    _remove_left(self._path.parent)
                seen[0] = self._read()

        agree(everyone, look)
        first = everyone.gather(None if seen[0] is None else dataclasses.asdict(seen[0]))[0]
        self._found = None if first is None else Answers(**first)

    def get(self, make: Callable[[], Answers]) -> Answers:
        """The answers that were there, or else what ``make`` gives, which is kept for others."""
        if self._found is not None:
            if self._is_main:
                logger.info("the held-out answers before training are those of %s", self._path)
            return self._found
        made = make()
        if self._is_main:
            with disk_errors(self._path.parent, PARAMETER):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Runs that begin at the same time write the same file: each one a whole one of its own.
                own = self._path.with_name(_own_name())
                own.write_text(json.dumps(dataclasses.asdict(made), ensure_ascii=False) + "\n", "utf-8")
                flush(own)
                own.replace(self._path)
        return made

    def _read(self) -> Answers | None:
        if not self._path.is_file():
            return None
        try:
            return Answers(**json.loads(self._path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(
                f"{PARAMETER}: found {self._path}, which no run has written so; accepted: another directory, "
                "or to remove that file"
            ) from None


def _own_name() -> str:
    """Of a file that only this process writes."""
    return f".{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.json"


def _remove_left(directory: Path) -> None:
    """Remove what killed processes have left half written. Raises ``OSError``."""
    for path in directory.glob(".*.json"):
        named = _OWN.fullmatch(path.name)
        if named is None or path.is_symlink():
            continue
        with suppress(FileNotFoundError):  # another process may remove it, too, or give it its name
            status = path.stat()
            ended = named["host"] == socket.gethostname() and not _runs(int(named["process"]))
            if ended or time.time() - status.st_mtime > _QUIET:
                path.unlink()
                tell_removed(path, status.st_size)


def _runs(process: int) -> bool:
    """Whether this host has a process of that number."""
    try:
        with suppress(PermissionError):  # another user's
            os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def digest(record: Mapping[str, Any], world: int) -> str:
    """Of all that the answers of a policy before its first update follow from."""
    settings = {key: value for key, value in record["settings"].items() if not key.startswith(_LATER)}
    about = {"settings": settings, "contents": record["contents"], "world": world}
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]
