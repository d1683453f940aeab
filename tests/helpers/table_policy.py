"""A fake engine whose policy is a table of logits, as the server of ``vllm_protocol`` answers with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapo_mega.engine.base import GradientReport
from tests.helpers.fake_engine import WORDS, FakeEngine

VOCABULARY = len(WORDS)


class TablePolicy(FakeEngine):
    """A policy that is a table of logits, with tensors of other sizes beside it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.learn(seed)
        self.changes = 0
        self.streams = 0

    def learn(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.changes += 1

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.streams += 1
        yield "norm", torch.ones(3)
        yield "table", self.table
        yield "large", torch.zeros(400_000)
        yield "last", torch.ones(1)

    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        super().save(directory, extra)
        torch.save(self.table, directory / "table.pt")

    def load(self, directory: Path) -> dict[str, Any]:
        self.table = torch.load(directory / "table.pt")
        return super().load(directory)

    def update_policy(self, *arguments: Any, **options: Any) -> GradientReport:
        report = super().update_policy(*arguments, **options)
        self.table = self.table + 0.01
        self.table[:, 2] += 0.5
        return report
