"""Training runs above a table policy whose responses a small server draws, some steps ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gapo_mega.rollout.backends.vllm import Vllm
from gapo_mega.runs.trainer import Trainer
from tests.helpers.fake_runs import Words, trainer
from tests.helpers.metrics_log import VARYING, metrics
from tests.helpers.table_policy import TablePolicy

STEPS = 5
PATIENCE = 20.0  # seconds for another thread


def built(
    directory: Path,
    url: str,
    engine: TablePolicy | None = None,
    *,
    ahead: int = 1,
    objectives: list[Words] | None = None,
    **sections: Any,
) -> Trainer:
    vllm = {"url": url, "patience": 0, "start_timeout": 2, "timeout": PATIENCE}
    rollout = {"backend": "vllm", "ahead": ahead, "vllm": vllm}
    settings: dict[str, Any] = {"steps": STEPS, "rollout": rollout, "backend": Vllm, **sections}
    return trainer(directory, engine or TablePolicy(), objectives, **settings)


def lines(directory: Path) -> list[dict[str, Any]]:
    """What the log has of every step, but for the times, and for weights, which evaluations are sent, too."""
    clocked = ("rollout/seconds", "rollout/waited", "rollout/overlap", "rollout/weights", "weights/")
    return metrics(directory, (*VARYING, *clocked))
