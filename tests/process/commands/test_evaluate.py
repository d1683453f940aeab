"""An evaluation on two data ranks, killed in the middle."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil

from tests.helpers.commands import Command
from tests.helpers.perturbed import perturbed
from tests.helpers.run_files import write_run_file

BATCH = 4  # lines: two responses on each of two data ranks


def start(folder: Path, *arguments: str) -> Command:
    words = ["evaluate", "--config", folder / "run.yaml"]
    models = ["--model", f"base={folder / 'model'}", "--model", f"tuned={folder / 'tuned'}"]
    settings = ["data.heldout_prompts=31", "evaluation.samples_per_prompt=2", "rollout.batch_size=2"]
    return Command(*words, *models, *arguments, "--nproc", 2, *settings)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def test_killed_it_loses_a_batch_at_most(tmp_path: Path) -> None:
    write_run_file(tmp_path)
    perturbed(tmp_path / "model", tmp_path / "tuned", seed=1)
    out = tmp_path / "run" / "evaluation"
    tuned = out / "tuned" / "responses.jsonl"
    process = start(tmp_path)
    try:
        while len(lines(tuned)) < 2 * BATCH and process.poll() is None:
            time.sleep(0.01)
    finally:
        # Torchrun puts every worker into a session of its own.
        torchrun = psutil.Process(process.pid)
        for each in [*torchrun.children(recursive=True), torchrun]:
            each.kill()
        process.communicate()
    before = {name: lines(out / name / "responses.jsonl") for name in ("base", "tuned")}
    assert len(before["base"]) == 62 > len(before["tuned"]) >= 2 * BATCH
    process = start(tmp_path, "--threshold", "plain=0.5")
    output, _ = process.communicate()
    assert process.returncode == 0, output[-6000:]
    kept = len(before["tuned"]) // BATCH * BATCH
    assert lines(out / "base" / "responses.jsonl") == before["base"]
    after = lines(tuned)
    assert after[:kept] == before["tuned"][:kept]
    places = [(row["number"], row["sample"]) for row in map(json.loads, after)]
    assert places == [divmod(line, 2) for line in range(62)]
    document = json.loads((out / "evaluation.json").read_text())
    shares = [float(json.loads(line)["scores"]["plain"] > 0.5) for line in after]
    found = document["models"]["tuned"]["measures"]
    assert found["above/plain"]["mean"] == sum(shares) / 62
    assert found["kl"]["mean"] > 0 == document["models"]["base"]["measures"]["kl"]["mean"]
    assert "| plain > 0.5 (share) |" in output


def test_what_is_wrong_is_one_line_before_processes_start(tmp_path: Path) -> None:
    write_run_file(tmp_path)
    perturbed(tmp_path / "model", tmp_path / "tuned", seed=1)
    process = start(tmp_path, "--threshold", "plane=1")
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output.splitlines()[-1] == "error: --threshold: found 'plane', accepted: concise, plain"
    assert not (tmp_path / "run").exists()
