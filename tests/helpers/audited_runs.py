"""Run directories with a log of known Gram matrices, as an audit reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapo_mega import aggregation
from gapo_mega.config import Config
from gapo_mega.config.loading import dump
from gapo_mega.engine.base import GradientReport
from gapo_mega.runs.log import JsonLines
from gapo_mega.runs.metrics import step_metrics

NAMES = ["helpful", "harmless", "honest", "brief"]
GAPO = {"name": "gapo", "options": {"p": 1, "scale": "mean_norm"}}
SKIPPED = 3


def write_run(
    directory: Path, grams: Sequence[Tensor], method: dict[str, Any] = GAPO, **sections: Any
) -> Path:
    """The run directory of a run that saw ``grams``; a matrix with NaN was a skipped step."""
    names = NAMES[: len(grams[0])]
    config = Config(
        output_dir=str(directory),
        model={"path": "a/model"},  # type: ignore[arg-type]
        data={"source": "prompts.jsonl"},  # type: ignore[arg-type]
        objectives=[{"name": name, "function": "module:function"} for name in names],  # type: ignore[list-item]
        aggregation=method,  # type: ignore[arg-type]
        **sections,
    )
    dump(config, directory / "config.yaml")
    aggregator = aggregation.build(method["name"], **method["options"])
    log = JsonLines(directory / "metrics.jsonl")
    log.restart(0)
    for step, gram in enumerate(grams, start=1):
        skipped = not bool(gram.isfinite().all())
        weights = torch.zeros(len(names), dtype=torch.float64) if skipped else aggregator(gram)
        report = GradientReport([0.0] * len(names), gram, weights, 1.0, 1.0, 1e-6, skipped=skipped)
        facts: dict[str, Any] = {"kl": 0.0, "tokens_per_second": 1.0, "peak_memory_bytes": 1, "seconds": {}}
        log.write(step, step_metrics(report, names, rewards=[0.0] * len(names), **facts))
    log.close()
    return directory


def random_grams(m: int, steps: int = 8) -> list[Tensor]:
    """Norms that differ by orders of magnitude; at step 2 the last gradient is zero, step 3 was skipped."""
    generator = torch.Generator().manual_seed(m)
    lengths = torch.logspace(-3, 2, m, dtype=torch.float64)
    rows = [
        torch.randn(m, m + 2, generator=generator, dtype=torch.float64) * lengths[:, None]
        for _ in range(steps)
    ]
    rows[1][-1] = 0
    rows[SKIPPED - 1][0, 0] = math.nan
    return [r @ r.T for r in rows]
