"""examples/arithmetic.yaml for two steps with a tiny model, with the prompts that its script makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.environment import ROOT, environment
from tests.helpers.tiny import tiny_chat_model


def test_two_steps_offline(tmp_path: Path, smollm2: Path) -> None:
    tiny_chat_model(tmp_path / "model", smollm2)
    prompts, run = tmp_path / "arithmetic.jsonl", tmp_path / "run"
    script = [
        sys.executable,
        "-m",
        "gapo_mega.demo.arithmetic",
        str(prompts),
        "--count",
        "40",
        "--heldout",
        "4",
    ]
    subprocess.run(script, env=environment(), check=True, timeout=120)
    overrides = [
        f"output_dir={run}",
        "steps=2",
        "micro_batch_size=4",
        f"model.path={tmp_path / 'model'}",
        f"data.source={prompts}",
        f"data.heldout_source={prompts}",
        "data.heldout_prompts=4",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=2",
        "rollout.max_new_tokens=12",
        "logging.tensorboard=false",
    ]
    command = [sys.executable, "-m", "gapo_mega.cli", "train", "--nproc", "2"]
    command += ["--config", str(ROOT / "examples" / "arithmetic.yaml"), *overrides]
    offline = environment() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for name in ("correct", "brief"):
        assert all(0 <= record[f"reward/{name}"] <= 1 for record in records)
        assert f"grad_norm/{name}" in records[0]
