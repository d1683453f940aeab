"""The cluster script is a program for bash and for Python; both forms plan the same run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gapo_mega.config import Config
from tests.helpers.tiny import byte_tokenizer, safe_rlhf_model, tiny_mistral

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SCRIPT = EXAMPLES / "gapo_mistral7b.sh"
FITTING = ["data.max_prompt_tokens=32", "rollout.max_new_tokens=32"]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = (
        tmp_path_factory.mktemp("models") / "tiny mistral"
    )  # a space: quoting matters in both languages
    tiny_mistral(directory)
    for name in ("reward", "cost"):
        safe_rlhf_model(directory.parent / name, name)
        byte_tokenizer(directory.parent / name)
    return directory


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("TP", "PP", "MODEL", "REWARD", "COST", "OUTPUT_DIR", "WORLD_SIZE", "RANK")
    }
    if "MODEL" in environment:
        beside = Path(environment["MODEL"]).parent
        environment |= {"REWARD": str(beside / "reward"), "COST": str(beside / "cost")}
    clean |= {"PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300)


def resolved(done: subprocess.CompletedProcess[str]) -> Config:
    """The configuration that a dry run printed: the rest of its output are comments."""
    assert done.returncode == 0, done.stdout + done.stderr
    return Config.model_validate(yaml.safe_load(done.stdout))


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_dry_run_through_bash_and_through_python_is_the_same(mistral: Path, tmp_path: Path) -> None:
    environment = {"TP": "2", "PP": "2", "MODEL": str(mistral), "OUTPUT_DIR": str(tmp_path / "o: x")}
    arguments = [str(SCRIPT), "--dry-run", *FITTING, "optimizer.lr=3e-6"]
    bash = run(["bash", *arguments], **environment, NNODES="2", NPROC_PER_NODE="4")
    # What torchrun does on every rank: the script in Python, with the world in the environment.
    python = run([sys.executable, "-u", *arguments], **environment, WORLD_SIZE="8", RANK="0")
    config = resolved(bash)
    assert bash.stdout == python.stdout
    assert "# layout: 8 processes = tensor 2 x pipeline 2 x data 2" in bash.stdout
    assert "# peak" in bash.stdout
    assert (config.model.path, config.output_dir) == (str(mistral), str(tmp_path / "o: x"))
    assert (config.parallel.tensor, config.parallel.pipeline, config.optimizer.lr) == (2, 2, 3e-6)
    other_rank = run([sys.executable, *arguments], **environment, WORLD_SIZE="8", RANK="1")
    assert (other_rank.returncode, other_rank.stdout) == (0, "")


def test_dry_run_under_torchrun(mistral: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc_per_node", "2", str(SCRIPT), "--dry-run", "parallel.tensor=2", *FITTING]
    done = run(command, MODEL=str(mistral))
    assert resolved(done).parallel.tensor == 2
    assert "# layout: 2 processes = tensor 2 x pipeline 1 x data 1" in done.stdout


def test_layout_that_does_not_fit_is_refused(mistral: Path) -> None:
    done = run(["bash", str(SCRIPT), "--dry-run", *FITTING], MODEL=str(mistral), TP="4", NPROC_PER_NODE="4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: parallel.tensor: found 4, accepted for a model with 4 attention heads"
    )
