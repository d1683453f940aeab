"""All ranks wait while the main one puts the exported model somewhere, however long that takes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from gapo_mega.engine.base import Ranks
from gapo_mega.runs.checkpoints import any_replica
from gapo_mega.runs.uploads import Export
from gapo_mega.whereabouts import get_on

_BETWEEN_LOOKS = 0.2  # seconds


def put_from_main(export: Export, directory: Path, step: int, ranks: Ranks) -> None:
    """``export.put`` on the main rank. Collective; raises its ``ValueError`` on every rank.

    A thread does it: no rank is in one collective for as long as it takes, which ``parallel.timeout_minutes``
    would limit.
    """
    errors: list[str] = []

    def put() -> None:
        try:
            export.put(directory, step)
        except Exception as error:  # all ranks raise it, below
            errors.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=put, name="gapo-mega upload", daemon=True)
    if ranks.layout.is_main:
        thread.start()
    while any_replica(ranks, thread.is_alive()):
        if not ranks.layout.is_main:
            get_on()  # on the main rank the upload itself says so
        time.sleep(_BETWEEN_LOOKS)
    found = ranks.gather_over_data(ranks.broadcast_in_replica(errors))
    first = next((error for part in found for error in part), None)
    if first is not None:
        raise ValueError(first)
