"""A sweep of two points through the command: killed in the middle, gone on with, and its results."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pytest
import yaml

from gapo_mega.evaluation.summary import read_summary
from gapo_mega.runs.lock import check_free
from tests.helpers.environment import environment
from tests.helpers.metrics_log import metrics
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

POINTS = ("p_gapo-0.2_0.8-seed1", "p_gapo-0.8_0.2-seed1")
STEPS = 6
PATIENCE = 300.0  # seconds, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a base that writes a checkpoint every step, and a sweep of two preferences."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_llama(folder / "model", vocab=101, tied=True)
    byte_tokenizer(folder / "model", CHAT_TEMPLATE)
    lines = [json.dumps({"prompt": f"What is {i} plus {7 * i}?"}) for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    base = {
        "output_dir": str(folder / "unused"),
        "steps": STEPS,
        "micro_batch_size": 4,
        "model": {"path": str(folder / "model")},
        "data": {"source": str(folder / "prompts.jsonl"), "heldout_prompts": 12, "max_prompt_tokens": 90},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 6},
        "objectives": [
            {"name": "short", "function": "tests.helpers.rewards:short"},
            {"name": "vowels", "function": "tests.helpers.rewards:vowels"},
        ],
        "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"export_hf": False, "every_steps": 1},
        "logging": {"tensorboard": False, "progress": False},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    chats = [
        [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": f"Hi there, {i}"}]
        for i in range(16)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    sft = {
        "output_dir": "unused",
        "batch_size": 2,
        "micro_batch_size": 2,
        "max_steps": 1,
        "model": {"path": str(folder / "model"), "max_tokens": 64},
        "data": {"source": str(folder / "chats.jsonl")},
        "logging": {"tensorboard": False, "progress": False},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    sweep = {
        "base": "base.yaml",
        "warm_start": {"config": "sft.yaml"},
        "output_dir": str(folder / "out"),
        "seeds": [1],
        "jobs": 1,
        "grid": {"method": ["p_gapo"], "preference": [[0.2, 0.8], [0.8, 0.2]]},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return folder


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "gapo_mega.cli", "sweep", "--config", str(folder / "sweep.yaml"), *options]
    return subprocess.Popen(
        words, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == code, output[-4000:]
    return output


def wait_for(process: subprocess.Popen[str], wanted: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not wanted.exists():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"{wanted} is not there; {process.communicate()[0][-4000:]}")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def resumed(folder: Path) -> dict[str, Any]:
    """The sweep killed while its second point trains, then started again."""
    runs = [folder / "out" / "points" / name for name in POINTS]
    first = start(folder)
    wait_for(first, runs[1] / "checkpoints" / "step_00000001" / "complete.json")
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)
    first.communicate()
    kept = (runs[0] / "summary.json").read_bytes(), (runs[0] / "metrics.jsonl").stat().st_mtime_ns
    between = json.loads((folder / "out" / "results.json").read_text())
    output = finish(start(folder))
    return {"runs": runs, "kept": kept, "between": between, "output": output}


def test_finished_points_stay_and_others_resume(folder: Path, resumed: dict[str, Any]) -> None:
    done, half = resumed["runs"]
    assert ((done / "summary.json").read_bytes(), (done / "metrics.jsonl").stat().st_mtime_ns) == resumed[
        "kept"
    ]
    assert [row["step"] for row in metrics(half)] == list(range(1, STEPS + 1))
    log = (folder / "out" / "logs" / f"{POINTS[1]}.log").read_text()
    assert "resumed from" in log and "stopped by a signal" in log
    other = (folder / "out" / "logs" / f"{POINTS[0]}.log").read_text()
    assert "stopped by a signal" not in other
    # The second one did not answer again what the first one had, with the same model.
    shared = "the held-out answers before training are those of"
    assert shared in log and shared not in other and len(list((folder / "out" / "before").iterdir())) == 1
    for run in resumed["runs"]:
        check_free(run)


def test_points_begin_with_the_warm_start(folder: Path, resumed: dict[str, Any]) -> None:
    trained = folder / "out" / "warm_start" / "hf"
    assert (trained / "model.safetensors").read_bytes() != (
        folder / "model" / "model.safetensors"
    ).read_bytes()
    for run in resumed["runs"]:
        assert yaml.safe_load((run / "config.yaml").read_text())["model"]["path"] == str(trained)
    log = (folder / "out" / "logs" / "warm_start.log").read_text()
    assert log.count(f"run: {folder}") == 1, "trained once"


def test_results_are_there_after_every_point(resumed: dict[str, Any]) -> None:
    states = [point["state"] for point in resumed["between"]["points"]]
    assert states[0] == "finished" and states[1] in ("new", "running")
    assert resumed["between"]["hypervolume"] is not None


def test_results_are_those_of_the_runs(folder: Path, resumed: dict[str, Any]) -> None:
    found = json.loads((folder / "out" / "results.json").read_text())
    assert [point["preference"] for point in found["points"]] == [[0.2, 0.8], [0.8, 0.2]]
    assert [point["state"] for point in found["points"]] == ["finished", "finished"]
    summaries = [read_summary(run / "summary.json")[0] for run in resumed["runs"]]
    for point, summary, run in zip(found["points"], summaries, resumed["runs"], strict=True):
        assert point["heldout"]["short"]["after"] == summary["short"].after
        assert point["heldout"]["vowels"]["gain"] == summary["vowels"].difference
        assert (point["samples"], point["updates"]) == (STEPS * 8, STEPS)
        assert point["backwards"] == STEPS  # one pass for both objectives
        assert point["kl"] == pytest.approx(metrics(run)[-1]["kl"])
    means = np.array([[summary[name].after for name in ("short", "vowels")] for summary in summaries])
    # Both runs begin with the same answers, so that either one's is the base's.
    reference = [summaries[0][name].before for name in ("short", "vowels")]
    assert found["reference_point"]["values"] == {"short": reference[0], "vowels": reference[1]}
    assert found["reference_point"] == resumed["between"]["reference_point"]
    wanted = moocore.hypervolume(means, ref=reference, maximise=True)
    assert found["hypervolume"] == pytest.approx(wanted)
    assert "2 points: 2 finished" in resumed["output"]
    table = json.loads((folder / "out" / "compare" / "compare.json").read_text())
    assert [group["after"]["short"]["mean"] for group in table["groups"]] == means[:, 0].tolist()
    assert {test["over_prompts"]["n"] for test in table["tests"]} == {12}


def test_a_second_run_starts_nothing(folder: Path, resumed: dict[str, Any]) -> None:
    logs = [folder / "out" / "logs" / f"{name}.log" for name in POINTS]
    before = [log.stat().st_size for log in logs]
    results = (folder / "out" / "results.json").read_bytes()
    assert "2 points: 2 finished" in finish(start(folder))
    assert [log.stat().st_size for log in logs] == before
    assert (folder / "out" / "results.json").read_bytes() == results


def test_a_finished_point_of_other_settings_is_refused(folder: Path, resumed: dict[str, Any]) -> None:
    output = finish(start(folder, 'settings={"optimizer.lr": 0.02}', "--dry-run"), 2)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (
        f"point 0 ({POINTS[0]}): optimizer.lr: found 0.02" in line and "had 0.01" in line and "1 more" in line
    )
