"""The command as a process: what it prints, imports and starts."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from gapo_mega import ops
from tests.helpers.run_files import write_run_file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_file(tmp_path_factory.mktemp("cli"))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gapo_mega.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_and_version() -> None:
    top, train = command("--help"), command("train", "--help")
    assert top.returncode == train.returncode == 0
    for name in ("train", "convert", "info"):
        assert name in top.stdout
    for option in ("--config", "--nproc", "--dry-run", "--world"):
        assert option in train.stdout
    assert command("--version").stdout == f"gapo-mega {version('gapo-mega')}\n"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from gapo_mega.cli import app\n"
        "try: app(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'datasets', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_info_says_what_is_installed() -> None:
    done = command("info")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert f"isa {ops.info()['isa']}" in done.stdout
    assert "transformer-engine" in done.stdout and "apex" in done.stdout


def test_user_error_of_the_command_itself(file: Path) -> None:
    done = command("train", "--config", str(file), "steps=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: steps: found 0, accepted: greater than or equal to 1 (from override 'steps=0')\n"
    )


def test_nproc_starts_that_many_ranks_with_their_share_of_the_cores() -> None:
    script = "from gapo_mega.commands.launch import start; start(2, ['--version'])"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # Counted, because the two may write onto one line.
    assert done.stdout.count(f"gapo-mega {version('gapo-mega')}") == done.stdout.count("gapo-mega") == 2
    assert "OMP_NUM_THREADS" not in done.stderr  # torchrun warns where it has to choose the number itself
