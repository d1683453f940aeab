"""What a run's ``metrics.jsonl`` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLOCKED = ("time/", "tokens_per_second")
VARYING = (*CLOCKED, "memory/")


def metrics(run: Path, without: tuple[str, ...] = VARYING) -> list[dict[str, Any]]:
    """A dictionary for every line, but for the keys that start with one of ``without``."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(without)} for line in lines]
