"""Judges' scores of held-out answers, of the prompts that the run's configuration gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.comparison.judges import heldout_prompts, judged
from gapo_mega import objectives
from gapo_mega.config import ObjectiveConfig
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "model", vocab=101, tied=True)
    byte_tokenizer(tmp_path / "model", CHAT_TEMPLATE)
    rows = [json.dumps({"prompt": f"What is {i}?"}) for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "output_dir": str(tmp_path),
        "seed": 3,
        "model": {"path": str(tmp_path / "model")},
        "data": {"source": str(tmp_path / "prompts.jsonl"), "heldout_prompts": 3},
        "objectives": [{"name": "short", "function": "tests.helpers.rewards:short"}],
        "evaluation": {"samples_per_prompt": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_answers_are_scored_before_and_after(run: Path) -> None:
    prompts = heldout_prompts(run)
    assert len(prompts) == 6 and len({prompt.text for prompt in prompts}) == 3
    rows = [
        {
            "prompt": prompt.text,
            "before": {"response": "a" * i, "scores": {"own": 0.0}},
            "after": {"response": "b" * (10 - i), "scores": {"own": 0.0}},
        }
        for i, prompt in enumerate(prompts)
    ]
    judge = objectives.build(ObjectiveConfig(name="judge", function="tests.helpers.rewards:short"))
    found = judged(rows, prompts, [judge])
    for when in ("before", "after"):
        texts = [row[when]["response"] for row in rows]
        assert [row[when]["scores"] for row in found] == [{"judge": s} for s in judge.score(prompts, texts)]
    assert len({row["after"]["scores"]["judge"] for row in found}) > 1
    with pytest.raises(ValueError, match="answers to other prompts"):
        judged([*rows[1:], rows[0]], prompts, [judge])
