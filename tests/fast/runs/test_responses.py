"""Responses of training batches that a run keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import Tensor

from gapo_mega.types import TokenBatch
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.fake_runs import PROMPTS, trainer
from tests.helpers.metrics_log import metrics
from tests.helpers.team import Team


def rows(run: Path, step: int) -> list[dict[str, Any]]:
    path = run / "responses" / f"step_{step:08d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "responses").iterdir())


def test_every_second_step_is_kept(tmp_path: Path) -> None:
    assert trainer(tmp_path, logging={"responses": 2}).run()
    assert names(tmp_path) == ["step_00000002.jsonl", "step_00000004.jsonl"]
    found = rows(tmp_path, 2)
    assert len(found) == 8 and [row["sample"] for row in found] == [0, 1] * 4
    assert {row["step"] for row in found} == {2}
    texts = {prompt.index: prompt.text for prompt in PROMPTS}
    for row in found:
        assert row["prompt"] == texts[row["number"]]
        assert row["scores"]["long"] == len(row["response"].split()) + len(row["prompt"])
        assert row["tokens"] == len(row["response"].split()) + 1 and row["finished"] is True
    line = metrics(tmp_path)[1]
    assert line["reward/long"] == pytest.approx(sum(row["scores"]["long"] for row in found) / 8)
    per_token = sum(row["kl"] for row in found) / sum(row["tokens"] for row in found)
    assert line["kl"] == pytest.approx(per_token, rel=1e-5)  # fp32 log-probabilities


def test_prompts_that_are_left_out_of_the_updates_are_kept(tmp_path: Path) -> None:
    assert trainer(
        tmp_path, steps=1, logging={"responses": 1}, advantages={"name": "group", "filter_flat": True}
    ).run()
    assert len(rows(tmp_path, 1)) == 8


def test_training_does_not_depend_on_it(tmp_path: Path) -> None:
    engines = []
    for name, every in (("with", 1), ("without", 0)):
        engines.append(FakeEngine())
        assert trainer(tmp_path / name, engines[-1], logging={"responses": every}).run()
    assert engines[0].calls == engines[1].calls and engines[0].policy == engines[1].policy
    assert not (tmp_path / "without" / "responses").exists()


def test_steps_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    """A file of a later step, and half a file, do not stay; other files do."""
    assert trainer(tmp_path / "whole", logging={"responses": 1}).run()
    run = tmp_path / "run"
    engine = FakeEngine(at={("update_policy", 2): terminate})
    assert not trainer(run, engine, logging={"responses": 1}).run()
    folder = run / "responses"
    (folder / "step_00000003.jsonl").write_text("of a process that was killed")
    (folder / "step_00000900.jsonl").write_text("of another number of steps")
    (folder / "mine.txt").write_text("mine")
    assert trainer(run, logging={"responses": 1}).run()
    assert names(run) == ["mine.txt", *names(tmp_path / "whole")]
    for step in range(1, 5):
        assert rows(run, step) == rows(tmp_path / "whole", step)


def test_all_data_ranks_are_in_one_file(tmp_path: Path) -> None:
    def run(engine: Any) -> None:
        work = trainer(tmp_path / str(engine.layout.rank), engine, logging={"responses": 1}, steps=1)
        prompts = [PROMPTS[i] for i in work.order.items(0)]
        work.maker.make(prompts, 5, lambda *found: work.responses.write(1, *found))

    Team(world=2, data=2).run(run)
    found = rows(tmp_path / "0", 1)
    assert len(found) == 8 and len({row["number"] for row in found}) == 4
    assert not (tmp_path / "1" / "responses").exists()


def test_any_text_is_a_line(tmp_path: Path) -> None:
    texts = iter(["a\u2028b", "c\nd", "\u0085", '"}'] * 2)
    engine = FakeEngine()
    work = trainer(tmp_path, engine, logging={"responses": 1}, steps=1)
    work.maker.make(
        PROMPTS[:4],
        5,
        lambda rollout, experience: work.responses.write(
            1, type(rollout)(**{**vars(rollout), "responses": list(texts)}), experience
        ),
    )
    assert [row["response"] for row in rows(tmp_path, 1)[:4]] == ["a\u2028b", "c\nd", "\u0085", '"}']


class Strict(FakeEngine):
    """Its reference rules out the first response token of every batch."""

    def logprobs(self, batch: TokenBatch, model: Literal["policy", "reference"]) -> Tensor:
        found = super().logprobs(batch, model)
        if model == "reference":
            found[0, int(batch.response_mask_BT[0].nonzero()[0])] = -math.inf
        return found


def test_an_infinite_divergence_is_null(tmp_path: Path) -> None:
    """JSON has no infinity; everything else of the row is there."""
    algorithm = {"kl": "loss", "kl_beta": 0.0}
    assert trainer(tmp_path, Strict(), steps=1, logging={"responses": 1}, algorithm=algorithm).run()
    first, *others = rows(tmp_path, 1)
    assert first["kl"] is None and first["tokens"] > 0
    assert all(isinstance(row["kl"], float) for row in others)
