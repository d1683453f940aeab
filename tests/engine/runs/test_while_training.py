"""Real runs in this process that evaluate themselves: undisturbed, resumed, and ended with their best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gapo_mega.config import Config
from gapo_mega.config.loading import parse
from gapo_mega.engine.base import checkpoint_converter
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.runs.start import train
from tests.helpers.metrics_log import CLOCKED, VARYING, metrics
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

REWARDS = '''
"""Rewards of these tests."""

import os
import signal
from pathlib import Path

CALLS = 0


def falling(prompts: list[str], responses: list[str]) -> list[float]:
    """Lower at every call."""
    global CALLS
    CALLS += 1
    return [len(response) / 1000 - CALLS for response in responses]


def due(prompts: list[str], flag: str) -> bool:
    """Whether this is the held-out evaluation that the file counts down to; the file goes then."""
    path = Path(flag)
    if "minus" not in prompts[0] or not path.exists():
        return False
    left = int(path.read_text()) - 1
    path.write_text(str(left))
    if left == 0:
        path.unlink()
    return left == 0


def vowels(responses: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


def stopping(prompts: list[str], responses: list[str], *, flag: str) -> list[float]:
    """Stops the run in the evaluation that is due."""
    if due(prompts, flag):
        os.kill(os.getpid(), signal.SIGTERM)
    return vowels(responses)


def failing(prompts: list[str], responses: list[str], *, flag: str) -> list[float]:
    """Raises in the evaluation that is due."""
    if due(prompts, flag):
        raise OSError("a disk of its own is full")
    return vowels(responses)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts and rewards."""
    folder = tmp_path_factory.mktemp("while_training")
    tiny_llama(folder / "model")
    byte_tokenizer(folder / "model", CHAT_TEMPLATE)
    for name, word in (("prompts", "plus"), ("heldout", "minus")):
        rows = [json.dumps({"prompt": f"What is {i} {word} {7 * i}?"}) for i in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def run(folder: Path, name: str, reward: str, options: dict[str, Any], **sections: Any) -> Path:
    """Train for three steps with ``reward`` beside the length of responses."""
    config: dict[str, Any] = {
        "output_dir": str(folder / name),
        "steps": 3,
        "micro_batch_size": 4,
        "model": {"path": str(folder / "model")},
        "data": {
            "source": str(folder / "prompts.jsonl"),
            "heldout_source": str(folder / "heldout.jsonl"),
            "heldout_split": "train",
            "heldout_prompts": 4,
            "max_prompt_tokens": 80,
        },
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6},
        "objectives": [
            {"name": "short", "function": "tests.helpers.rewards:short"},
            {"name": "own", "function": f"{folder / 'rewards.py'}:{reward}", "options": options},
        ],
        "optimizer": {"lr": 1e-3},
        "logging": {"tensorboard": False, "progress": False},
        **sections,
    }
    train(parse(config, [], Config, "test", folder))
    return folder / name


def test_evaluated_stopped_in_an_evaluation_and_resumed(folder: Path) -> None:
    """Steps are bit for bit those of a run without evaluations; the best is what it would have been."""
    flag = folder / "flag"
    sections: dict[str, Any] = {
        "evaluation": {"every_steps": 1, "early_stopping_patience": 9, "shown": 1},
        "checkpoint": {"best": "worst_gain", "keep": 1},
    }
    options = {"flag": str(flag)}
    plain = run(folder, "plain", "stopping", options)
    whole = run(folder, "whole", "stopping", options, **sections)
    assert metrics(whole, (*VARYING, "heldout")) == metrics(plain)
    flag.write_text("3")  # before training, after step 1, after step 2
    stopped = run(folder, "stopped", "stopping", options, **sections)
    assert not flag.exists() and not (stopped / "summary.json").exists()
    assert [line["step"] for line in metrics(stopped)] == [1, 2]
    assert "Running: step 2 of 3" in (stopped / "report" / "index.html").read_text()
    run(folder, "stopped", "stopping", options, **sections)
    assert metrics(stopped) == metrics(whole)
    found = [json.loads((path / "summary.json").read_text()) for path in (whole, stopped)]
    assert {**found[0], "seconds": 0} == {**found[1], "seconds": 0}
    weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (whole, stopped)]
    assert weights[0] == weights[1]


def test_a_reward_that_fails_in_an_evaluation_loses_no_step(folder: Path) -> None:
    """Also with running means of gradients; the run that goes on evaluates first."""
    flag = folder / "failing"
    sections: dict[str, Any] = {
        "evaluation": {"every_steps": 1, "shown": 1},
        "aggregation": {"average": 0.9},
    }
    options = {"flag": str(flag)}
    whole = run(folder, "unfailing", "failing", options, **sections)
    flag.write_text("3")  # before training, after step 1, after step 2
    with pytest.raises(ValueError, match=r"own.*a disk of its own is full"):
        run(folder, "failed", "failing", options, **sections)
    groups.shutdown()  # which the end of the process does otherwise
    failed = folder / "failed"
    assert [path.name for path in (failed / "checkpoints").iterdir()] == ["step_00000002"]
    assert [line["step"] for line in metrics(failed)] == [1]
    run(folder, "failed", "failing", options, **sections)
    assert metrics(failed) == metrics(whole)
    weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (whole, failed)]
    assert weights[0] == weights[1]


def test_the_result_is_the_best_policy(folder: Path, tmp_path: Path) -> None:
    """The first evaluation's, whose checkpoint the converter exports alike."""
    path = run(
        folder, "falling", "falling", {},
        evaluation={"every_steps": 1, "early_stopping_patience": 1, "shown": 1},
        checkpoint={"best": "own", "save_final": True, "keep": 1},
    )  # fmt: skip
    steps = sorted(checkpoint.name for checkpoint in (path / "checkpoints").iterdir())
    assert steps == ["step_00000001", "step_00000002"]
    exported = load_file(path / "hf" / "model.safetensors")
    converter = checkpoint_converter()
    for step, same in ((1, True), (2, False)):
        converter.to_hf(path / "checkpoints" / f"step_{step:08d}", tmp_path / str(step))
        expected = load_file(tmp_path / str(step) / "model.safetensors")
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[key], expected[key]) for key in expected) is same
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["step"], summary["steps"], summary["steps_asked"]) == (1, 2, 3)
    # Answered again with the weights that were loaded.
    line = metrics(path, CLOCKED)[0]
    assert summary["objectives"]["short"]["after"] == line["heldout/short"]
    assert line["heldout_best_step"] == 1
