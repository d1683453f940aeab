"""``sft`` and ``train-reward`` above an engine that skips: told, counted over restarts, ended at a limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapo_mega.config.supervised import RewardModelConfig, SftConfig
from gapo_mega.engine.base import SupervisedUpdate
from gapo_mega.runs import supervised
from gapo_mega.runs.supervised import RewardRun, SftRun
from gapo_mega.types import TokenBatch
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.tiny import byte_tokenizer, tiny_llama

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
KINDS: list[Any] = [(SftRun, SftConfig), (RewardRun, RewardModelConfig)]
MESSAGE = r"^stopped: the gradient was not finite in 3 updates in a row \(gradients\.max_nonfinite_steps\)$"


class Learner(FakeEngine):
    """Skips the updates whose numbers it is given, from 1 over the whole run."""

    def __init__(self, skipped: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self._skipped = skipped
        self.updates = 0

    def update(self, batch: TokenBatch) -> SupervisedUpdate:
        self._called("update")
        self.updates += 1
        self.changes += 1
        return SupervisedUpdate(1.0, 0.5, 1.0, 0.1, skipped=self.updates in self._skipped)

    def measure(self, batch: TokenBatch) -> Tensor:
        return torch.zeros(len(batch.tokens_BT))

    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        super().save(directory, extra | {"updates": self.updates})

    def load(self, directory: Path) -> dict[str, Any]:
        extra = super().load(directory)
        self.updates = extra.pop("updates")
        return extra


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervised")
    tiny_llama(folder / "model", vocab=300)
    byte_tokenizer(folder / "model")
    rows = []
    for i in range(40):
        question = f"\n\nHuman: May I have {i}?\n\nAssistant:"
        rows.append({"chosen": f"{question} yes", "rejected": f"{question} no"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(
    kinds: Any, model: Path, directory: Path, engine: Learner, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[dict[str, Any]]]:
    """The run over ``engine`` in place of Megatron, and its log."""
    run_kind, config_kind = kinds
    monkeypatch.setattr(run_kind, "_build", lambda self: engine)
    # That of a language model: reading it needs Megatron.
    monkeypatch.setattr(supervised, "read_score_head", lambda source: None)
    config = config_kind.model_validate(
        {
            "output_dir": str(directory),
            "batch_size": 4,
            "micro_batch_size": 4,
            "max_steps": 8,
            "model": {"path": str(model / "model"), "max_tokens": 120, "chat_template": TEMPLATE},
            "data": {"source": str(model / "rows.jsonl"), "heldout_fraction": 0.1},
            "gradients": {"max_nonfinite_steps": 3},
            "checkpoint": {"export_hf": False},
            "logging": {"tensorboard": False, "progress": False},
        }
    )
    run = run_kind(config)
    try:
        run.run()
    finally:
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return run, lines


@pytest.mark.parametrize("kinds", KINDS)
def test_skips_that_are_not_in_a_row_are_told_and_the_run_goes_on(
    kinds: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, lines = train(kinds, model, tmp_path, Learner([1, 2, 4, 5, 7]), monkeypatch)
    assert run.finished and run.skips.in_a_row == 0
    assert [line["skipped"] for line in lines] == [1, 1, 0, 1, 1, 0, 1, 0]
    said = [line for line in caplog.messages if "skipped" in line]
    assert said == [f"update {step} skipped: the gradient is not finite" for step in (1, 2, 4, 5, 7)]


@pytest.mark.parametrize("kinds", KINDS)
def test_the_limit_ends_the_run_and_its_log_has_every_step(
    kinds: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Learner([2, 3, 4])
    with pytest.raises(RuntimeError, match=MESSAGE):
        train(kinds, model, tmp_path, engine, monkeypatch)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert engine.updates == 4


@pytest.mark.parametrize("kinds", KINDS)
def test_a_resumed_run_goes_on_counting(
    kinds: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two skips, a signal, one more: three in a row."""
    stopping = Learner([2, 3, 4], at={("update", 3): terminate})
    run, _ = train(kinds, model, tmp_path, stopping, monkeypatch)
    assert not run.finished and run.loop.step == 3
    with pytest.raises(RuntimeError, match=MESSAGE):
        train(kinds, model, tmp_path, Learner([2, 3, 4]), monkeypatch)
