"""The contenders over gapo_mega's engine: ``MegatronEngine.update_policy`` in one process."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

from peer_contender import Seconds, gapo, synchronize
from peer_entries import Entry
from peer_inputs import BETAS, EPS, LEARNING_RATE, loss

from gapo_mega.config import Config
from gapo_mega.engine.base import GradientReport, build_engine
from gapo_mega.runs.preflight import resolve
from gapo_mega.types import Experience


def make_config(
    source: str, gradients: dict[str, Any], objectives: int, sequences: int, microbatches: int
) -> Config:
    """The default settings, except those that must match the other side (Adam, no clipping)."""
    return Config.model_validate(
        {
            "output_dir": "unused",
            "micro_batch_size": sequences // microbatches,
            "model": {"path": source},
            "data": {"source": "unused", "max_prompt_tokens": 1},
            # How `gradients.forward: auto` learns the number of microbatches.
            "rollout": {"prompts_per_step": sequences, "samples_per_prompt": 1, "max_new_tokens": 1},
            "advantages": {
                "name": "gae"
            },  # takes prompts of one sample; the batch has its advantages already
            "objectives": [
                {"name": f"o{i}", "function": "gapo_mega.demo.rewards:plain"} for i in range(objectives)
            ],
            "optimizer": {
                "lr": LEARNING_RATE,
                "beta1": BETAS[0],
                "beta2": BETAS[1],
                "eps": EPS,
                "schedule": "constant",
                "warmup_fraction": 0.0,
                "clip_grad": 0.0,
            },
            "gradients": gradients,
        }
    )


class Ours:
    """An engine over a world of one process."""

    def __init__(self, config: Config, batch: Experience) -> None:
        resolved = dataclasses.replace(resolve(config, 1), critic=None)
        self.engine = build_engine(resolved, pad_id=0, eos_ids=[2])
        # The peers have no reference model, and an update has no use for it.
        del self.engine.reference
        gc.collect()  # modules refer to each other in circles
        self.batch = batch
        self.aggregator = gapo()

    def _update(self) -> GradientReport:
        report = self.engine.update_policy(self.batch, loss, self.aggregator)
        if report.skipped:
            raise RuntimeError(f"ours skipped the update: gradients {report.nonfinite} are not finite")
        return report

    def look(self, scopes: list[Any]) -> dict[str, Any]:
        """Runs an update, whose Gram matrix belongs to the parameters before it."""
        return {"gram": self._update().gram.tolist(), "warnings": []}

    def step(self) -> Seconds:
        synchronize()
        start = time.perf_counter()
        report = self._update()
        synchronize()
        return time.perf_counter() - start, report.seconds["optimizer"]


def build(entry: Entry, source: str, batch: Experience, objectives: int, microbatches: int) -> Ours:
    """The contender of an entry with stack ``ours``."""
    return Ours(make_config(source, entry.options, objectives, batch.batch_size, microbatches), batch)
