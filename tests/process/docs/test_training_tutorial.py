"""Runs the blocks of docs/tutorial/training.md and of the first page, with a tiny model for SmolLM2."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.environment import ROOT, environment
from tests.helpers.pages import Block, blocks
from tests.helpers.tiny import tiny_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """What stands at ``models/SmolLM2-135M-Instruct``: its tokenizer's template, a model of 4 tiny layers."""
    directory = tmp_path_factory.mktemp("model")
    tiny_chat_model(directory, smollm2)
    return directory


def prepare(folder: Path, model: Path) -> dict[str, str]:
    """The environment in which commands run: ``gapo-mega`` is this checkout's."""
    (folder / "models").mkdir()
    (folder / "models" / "SmolLM2-135M-Instruct").symlink_to(model)
    (folder / "bin").mkdir()
    command = folder / "bin" / "gapo-mega"
    # As pip writes it: the working directory is not on the path. Writers of checkpoints load the file again.
    script = "from gapo_mega.cli import main\nif __name__ == '__main__':\n    main()\n"
    command.write_text(f"#!{sys.executable}\n{script}")
    command.chmod(0o755)
    settings = environment()
    return {**settings, "PATH": f"{folder / 'bin'}{os.pathsep}{settings['PATH']}"}


def write(folder: Path, found: list[Block]) -> None:
    for block in found:
        if block.file is not None:
            (folder / block.file).write_text(block.code)


def run(script: list[str], folder: Path, settings: dict[str, str]) -> str:
    done = subprocess.run(
        script, cwd=folder, env=settings, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def log(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_tutorial(tmp_path: Path, model: Path) -> None:
    found = blocks("docs/tutorial/training.md")
    write(tmp_path, found)
    settings = prepare(tmp_path, model)
    outputs = []
    for block in found:
        if block.language == "bash":
            outputs.append(run(["bash", "-euc", block.code], tmp_path, settings))
        elif block.file is None:
            outputs.append(run([sys.executable, "-c", block.code], tmp_path, settings))
    plan, mistake, _, steps, summary, audit, _, _ = outputs
    assert "layout: 1 processes" in plan and "steps: 6" in plan
    assert "error: rollout.max_tokens: unknown key, the nearest is 'max_new_tokens'; accepted: " in mistake
    assert steps.count("cosine of the gradients") == 6
    assert "short: " in summary and "plain: " in summary
    assert "every method, asked at each step (6)" in audit
    told = (tmp_path / "runs" / "first" / "audit" / "audit.csv").read_text()
    assert all(name in told for name in ("gapo", "mgda", "p_gapo", "weighted_sum"))

    first, preferred = log(tmp_path / "runs" / "first"), log(tmp_path / "runs" / "preferred")
    assert [step["step"] for step in first] == [1, 2, 3, 4, 5, 6, 7, 8]
    # GAPO hurts nobody, to rounding of the fp32 gradients.
    for step in first:
        for name in ("short", "plain"):
            assert step[f"predicted_change/{name}"] >= -1e-6 * step[f"grad_norm/{name}"] ** 2
    for step in preferred:
        unit = [step[f"weight/{name}"] * step[f"grad_norm/{name}"] for name in ("short", "plain")]
        # Logged in double precision, from norms of the same Gram matrix.
        assert math.isclose(unit[0] / sum(unit), 0.7, rel_tol=1e-9)
    assert (tmp_path / "runs" / "first" / "report" / "index.html").is_file()


def test_first_page(tmp_path: Path, model: Path) -> None:
    """README's rewards and configuration train as they stand; two steps suffice here."""
    found = blocks("README.md")
    assert [block.file for block in found if block.file] == ["rewards.py", "run.yaml"]
    write(tmp_path, found)
    settings = prepare(tmp_path, model)
    command = ["gapo-mega", "train", "--config", "run.yaml", "steps=2", "data.heldout_prompts=4"]
    run(command, tmp_path, settings)
    steps = log(tmp_path / "runs" / "first")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["grad_norm/short"] > 0 and step["grad_norm/plain"] > 0 for step in steps)


def test_first_page_is_short() -> None:
    """A newcomer reads it: some 80 lines, ten of YAML, six of a reward."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 95
    code = {block.file: block.code.strip().splitlines() for block in blocks("README.md")}
    assert len([line for line in code["run.yaml"] if not line.startswith("#")]) <= 11
    assert len([line for line in code["rewards.py"] if line.strip() and not line.startswith("#")]) <= 6
