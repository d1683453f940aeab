"""Runs without rollouts above an engine without a model, on pairs that each of them can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig
from gapo_mega.engine.base import Aggregator, GradientReport, PolicyLossSum, SupervisedUpdate
from gapo_mega.runs import pairs, supervised
from gapo_mega.runs.pairs import PairsRun
from gapo_mega.runs.supervised import RewardRun, SftRun
from gapo_mega.types import Experience, TokenBatch
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.tiny import byte_tokenizer, tiny_llama

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
KINDS: list[Any] = [(SftRun, SftConfig), (RewardRun, RewardModelConfig), (PairsRun, PairsConfig)]


class Learner(FakeEngine):
    """Skips the updates whose numbers it is given, from 1 over the whole run."""

    def __init__(self, skipped: Sequence[int] = (), **options: Any) -> None:
        super().__init__(**options)
        self._skipped = skipped
        self.updates = 0

    def update(self, batch: TokenBatch) -> SupervisedUpdate:
        self._called("update")
        self.updates += 1
        self.changes += 1
        return SupervisedUpdate(1.0, 0.5, 1.0, 0.1, skipped=self.updates in self._skipped)

    def update_policy(
        self, minibatch: Experience, loss: PolicyLossSum, aggregator: Aggregator, *, audit: bool = False
    ) -> GradientReport:
        """Of ``train-pairs``; the first objective is at fault where one is skipped."""
        self._called("update")
        self.updates += 1
        skipped = self.updates in self._skipped
        self.next_report = {"skipped": skipped, "nonfinite": [0] if skipped else []}
        return super().update_policy(minibatch, loss, aggregator, audit=audit)

    def measure(self, batch: TokenBatch) -> Tensor:
        return torch.zeros(len(batch.tokens_BT))

    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        super().save(directory, extra | {"updates": self.updates})

    def load(self, directory: Path) -> dict[str, Any]:
        extra = super().load(directory)
        self.updates = extra.pop("updates")
        return extra


def write_inputs(folder: Path, rows: int = 40) -> Path:
    """A model, and rows whose both sides are transcripts."""
    tiny_llama(folder / "model", vocab=300)
    byte_tokenizer(folder / "model")
    found = []
    for i in range(rows):
        question = f"\n\nHuman: May I have {i}?\n\nAssistant:"
        found.append({"chosen": f"{question} yes", "rejected": f"{question} no"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def prepared(
    kinds: Any,
    inputs: Path,
    directory: Path,
    engine: Learner,
    monkeypatch: pytest.MonkeyPatch,
    **changes: Any,
) -> Any:
    """The run over ``engine`` in place of Megatron."""
    run_kind, config_kind = kinds
    if run_kind is not PairsRun:
        monkeypatch.setattr(run_kind, "_build", lambda self: engine)
    else:
        monkeypatch.setattr(pairs, "build_engine", lambda *_, **__: engine)
    # That of a language model: reading it needs Megatron.
    monkeypatch.setattr(supervised, "read_score_head", lambda source: None)
    data = {"source": str(inputs / "rows.jsonl"), "heldout_fraction": 0.1}
    read: dict[str, Any] = {"data": data}
    if config_kind is PairsConfig:
        read = {"objectives": [{"name": name, "data": data} for name in ("a", "b")]}
    config = config_kind.model_validate(
        {
            "output_dir": str(directory),
            "batch_size": 4,
            "micro_batch_size": 4,
            "max_steps": 8,
            "model": {"path": str(inputs / "model"), "max_tokens": 120, "chat_template": TEMPLATE},
            "gradients": {"max_nonfinite_steps": 3},
            "checkpoint": {"export_hf": False},
            "logging": {"tensorboard": False, "progress": False},
            **read,
            **changes,
        }
    )
    return run_kind(config)
