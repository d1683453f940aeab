"""Whole training runs through the command: critics, resume after SIGKILL and SIGTERM, exported model."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.commands import Command, run
from tests.helpers.metrics_log import metrics
from tests.helpers.tiny import tiny_chat_model

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A tiny model with a real tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("training")
    tiny_chat_model(folder / "model", smollm2)
    lines = [json.dumps({"prompt": f"What is {i} plus {7 * i}?"}) for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_config(folder: Path, name: str, **sections: Any) -> Path:
    """A configuration of ``STEPS`` quick steps with two objectives."""
    config = {
        "output_dir": str(folder / name),
        "steps": STEPS,
        "micro_batch_size": 4,
        "model": {"path": str(folder / "model")},
        "data": {
            "source": str(folder / "prompts.jsonl"),
            "heldout_prompts": 6,
            "max_prompt_tokens": 60,
            "system_prompt": "Hi.",
        },
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8, "batch_size": 16},
        "objectives": [
            {"name": "short", "function": "tests.helpers.rewards:short"},
            {"name": "vowels", "function": "tests.helpers.rewards:vowels"},
        ],
        "aggregation": {"name": "gapo", "options": {"p": 1, "scale": "mean_norm"}},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every_steps": 1},
        "logging": {"tensorboard": False, "progress": False},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, *overrides: str) -> Command:
    """``gapo-mega train`` as one process, in its own process group."""
    return Command("train", "--config", config, *overrides)


def finish(process: Command, code: int = 0) -> str:
    """Its output, after it ended with ``code``."""
    output, _ = process.communicate()
    assert process.returncode == code, output[-6000:]
    return output


def wait_for_step(process: Command, run: Path, step: int) -> None:
    """Until the checkpoint of ``step`` is complete."""
    marker = run / "checkpoints" / f"step_{step:08d}" / "complete.json"
    deadline = time.monotonic() + 600
    while not marker.exists():
        assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    """The run directory of a run that nothing disturbed."""
    finish(start(write_config(folder, "straight")))
    return folder / "straight"


def test_run_directory(uninterrupted: Path) -> None:
    records = metrics(uninterrupted)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert any(record["cosine/short/vowels"] != 0 for record in records)
    summary = json.loads((uninterrupted / "summary.json").read_text())
    for name in ("short", "vowels"):
        facts = summary["objectives"][name]
        assert facts["samples"] == 6 and facts["standard_error"] > 0
    assert (uninterrupted / "report" / "index.html").stat().st_size > 10_000
    assert (uninterrupted / "report" / "overview.png").read_bytes()[:4] == b"\x89PNG"


def test_exported_model_is_the_trained_one(uninterrupted: Path, folder: Path) -> None:
    """transformers loads it, it differs from the start, and its greedy answers use the tokenizer."""
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    after = AutoModelForCausalLM.from_pretrained(uninterrupted / "hf")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "hf")
    changed = sum(
        float((a - b).abs().max()) > 0 for a, b in zip(before.parameters(), after.parameters(), strict=True)
    )
    assert changed == len(list(after.parameters())), "some parameters were not trained"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert torch.isfinite(after(**ids).logits).all()


def test_sigkill_and_resume_is_bit_for_bit(folder: Path, uninterrupted: Path) -> None:
    config = write_config(folder, "killed")
    process = start(config)
    wait_for_step(process, folder / "killed", 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    output = finish(start(config))
    assert "resumed from" in output
    assert metrics(folder / "killed") == metrics(uninterrupted)
    killed, straight = (folder / name / "hf" / "model.safetensors" for name in ("killed", "straight"))
    assert killed.read_bytes() == straight.read_bytes()


def test_sigterm_saves_and_resume_goes_on(folder: Path, uninterrupted: Path) -> None:
    config = write_config(folder, "terminated", checkpoint={"every_steps": 0})
    process = start(config)
    deadline = time.monotonic() + 600
    while not (folder / "terminated" / "metrics.jsonl").exists() or not metrics(folder / "terminated"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "stopped by a signal" in finish(process, 75)
    assert list((folder / "terminated" / "checkpoints").glob("step_*/complete.json"))
    assert not (folder / "terminated" / "summary.json").exists()
    finish(start(config))
    assert metrics(folder / "terminated") == metrics(uninterrupted)


def test_a_data_rank_without_held_out_prompts_keeps_nobody_waiting(folder: Path) -> None:
    """Parameters travel when the first forward asks for them, and one rank has none to run.

    The second step's responses come from parameters that the first step changed, half of them on each rank.
    """
    answers, records = {}, {}
    for name, overlap in (("gather", True), ("plain", False)):
        config = write_config(
            folder,
            f"one_prompt-{name}",
            steps=2,
            data={"heldout_prompts": 1},
            optimizer={"overlap_grad_reduce": overlap, "overlap_param_gather": overlap},
            checkpoint={"save_final": False, "export_hf": False, "every_steps": 0},
        )
        finish(start(config, "--nproc", "2"))
        summary = json.loads((folder / f"one_prompt-{name}" / "summary.json").read_text())
        answers[name] = {objective: facts["after"] for objective, facts in summary["objectives"].items()}
        records[name] = metrics(folder / f"one_prompt-{name}")
    assert answers["gather"] == answers["plain"], "an all-gather is a copy"
    assert records["gather"] == records["plain"]


@pytest.mark.parametrize(
    ("heads", "gradients"), [("shared", {"scope": "last_block"}), ("separate", {"store": "single"})]
)
def test_gae_with_critic(folder: Path, heads: str, gradients: dict[str, Any]) -> None:
    """The critic learns: its loss falls over repeated epochs; two optimizer steps per rollout."""
    config = write_config(
        folder,
        f"gae-{heads}",
        steps=2,
        advantages={"name": "gae", "options": {"gamma": 1.0, "lam": 0.95}, "whiten": True},
        critic={"heads": heads, "optimizer": {"lr": 3e-3, "schedule": "constant", "warmup_fraction": 0.0}},
        algorithm={"ppo_epochs": 3, "minibatches": 1},
        gradients=gradients,
        checkpoint={"every_steps": 1, "export_hf": False},
    )
    finish(start(config))
    records = metrics(folder / f"gae-{heads}")
    assert [record["step"] for record in records] == list(range(1, 7))
    keys = [key for key in records[0] if key.startswith("critic_loss/")]
    assert len(keys) == (1 if heads == "shared" else 2)
    for key in keys:
        assert records[2][key] < records[0][key]
    shutil.rmtree(folder / f"gae-{heads}")


def test_stops_after_nonfinite_gradients_in_a_row(folder: Path) -> None:
    """Two updates are skipped and logged with the objective's name, then the run ends with an error."""
    objectives = [
        {"name": "short", "function": "tests.helpers.rewards:short"},
        {"name": "broken", "function": "tests.helpers.rewards:overflowing"},
    ]
    config = write_config(
        folder,
        "nonfinite",
        objectives=objectives,
        gradients={"max_nonfinite_steps": 2},
        data={"heldout_prompts": 0},
        checkpoint={"every_steps": 0},
    )
    process = start(config)
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "the gradient of broken was not finite in 2 updates in a row" in output
    records = metrics(folder / "nonfinite")
    assert [record["skipped"] for record in records] == [1.0, 1.0]
    assert [record["nonfinite/broken"] for record in records] == [1.0, 1.0]
    assert [record["nonfinite/short"] for record in records] == [0.0, 0.0]


def test_throughput_tool(folder: Path) -> None:
    """Phases add up to no more than the step; utilisation follows from the numbers beside it."""
    config = write_config(folder, "throughput", checkpoint={"every_steps": 0})
    out = folder / "throughput.json"
    done = run("benchmark", "throughput", "--config", config, "--steps", 2, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens/s" in done.stdout and "backward" in done.stdout
    result = json.loads(out.read_text())
    phases = result["phases_seconds"]
    # One pass for both objectives.
    assert {"rollout", "score", "reference", "forward", "backward", "aggregate", "optimizer"} <= phases.keys()
    # Medians of phases need not add up to the median of the step exactly.
    assert 0 < sum(phases.values()) <= 1.5 * result["seconds_per_step"]
    utilisation = (
        result["model_flops_per_step"] / result["seconds_per_step"] / result["peak_flops_per_device"]
    )
    assert result["mfu"] == pytest.approx(utilisation, rel=1e-9)
