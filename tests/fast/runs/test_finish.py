"""The end of a run above a fake engine: what is exported, measured, written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_runs import trainer


def summary(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return found


def test_export_comes_before_the_answers_and_the_report_last(tmp_path: Path) -> None:
    engine = FakeEngine()
    run = trainer(tmp_path, engine, steps=2, with_report=True, checkpoint={"export_hf": True})
    assert run.run()
    assert engine.calls[-2:] == ["export_hf", "generate"]
    assert (tmp_path / "hf").is_dir()
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    facts = summary(tmp_path)["objectives"]["long"]
    assert run.before is not None
    assert facts["before"] == pytest.approx(sum(run.before.scores[0]) / 3)
    assert facts["samples"] == 3 and facts["after"] != facts["before"]


def test_the_adapter_is_exported_beside_the_model(tmp_path: Path) -> None:
    engine = FakeEngine()
    wanted = {"export_hf": True, "export_adapter": True}
    run = trainer(tmp_path, engine, steps=1, with_report=True, checkpoint=wanted, model={"lora": {}})
    assert run.run()
    assert engine.calls[-3:] == ["export_hf", "export_adapter", "generate"]
    assert (tmp_path / "adapter").is_dir()


def test_without_held_out_prompts_the_summary_is_empty(tmp_path: Path) -> None:
    engine = FakeEngine()
    assert trainer(tmp_path, engine, steps=1, with_report=True, held_out=[]).run()
    assert summary(tmp_path)["objectives"] == {}
    assert "export_hf" not in engine.calls


def test_without_a_report_nothing_follows_the_last_step(tmp_path: Path) -> None:
    engine = FakeEngine()
    assert trainer(tmp_path, engine, steps=1).run()
    assert engine.calls[-1] == "update_policy"
    assert not (tmp_path / "summary.json").exists()


def test_every_held_out_answer_is_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, FakeEngine(), steps=2, with_report=True)
    assert run.run()
    assert run.before is not None
    rows = [json.loads(line) for line in (tmp_path / "heldout_answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == run.before.prompts
    assert [row["before"]["response"] for row in rows] == run.before.responses
    for when in ("before", "after"):
        scores = [row[when]["scores"]["long"] for row in rows]
        assert sum(scores) / len(rows) == pytest.approx(summary(tmp_path)["objectives"]["long"][when])
