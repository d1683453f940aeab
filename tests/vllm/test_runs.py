"""A whole run on a real vLLM, one step ahead (make test-vllm)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import Config
from gapo_mega.config.loading import parse
from gapo_mega.runs.start import train
from tests.helpers.metrics_log import metrics
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

PYTHON = os.environ.get("GAPO_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="make test-vllm has a vLLM")


def test_a_run_one_step_ahead(tmp_path: Path) -> None:
    """Responses are of the trainer's distribution, and from the second step on of the one before."""
    tiny_llama(tmp_path / "model", head_dim=64)  # vLLM's attention on CPUs takes no heads of 16
    byte_tokenizer(tmp_path / "model", CHAT_TEMPLATE)
    rows = [json.dumps({"prompt": f"What is {i} plus {7 * i}?"}) for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    config: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "steps": 6,
        "micro_batch_size": 4,
        "model": {"path": str(tmp_path / "model"), "dtype": "fp32"},
        "data": {"source": str(tmp_path / "prompts.jsonl"), "heldout_prompts": 2, "max_prompt_tokens": 80},
        "rollout": {
            **{"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 16},
            **{"backend": "vllm", "ahead": 1, "top_k": 30},
            "vllm": {"python": PYTHON, "arguments": ["--enforce-eager"], "start_timeout": 1500},
        },
        "objectives": [
            {"name": "short", "function": "tests.helpers.rewards:short"},
            {"name": "vowels", "function": "tests.helpers.rewards:vowels"},
        ],
        "optimizer": {"lr": 1e-3},
        "logging": {"tensorboard": False, "progress": False},
    }
    assert train(parse(config, [], Config, "test", tmp_path))
    lines = metrics(tmp_path / "run", ())
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1, 1, 1]
    first, *others = (line["logprob_difference/max"] for line in lines)
    # fp32 of two implementations; an update of Adam moves every parameter by the learning rate, 1e-3.
    assert first < 1e-4 and min(others) > 1e-3
    names = (
        "time/step",
        "time/rollout",
        "rollout/seconds",
        "rollout/waited",
        "rollout/overlap",
        "rollout/weights",
    )
    for line in lines:
        print({name: round(line[name], 3) for name in names})
