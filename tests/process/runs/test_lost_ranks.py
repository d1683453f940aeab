"""Ranks that die, stop or hang: the others say who, and end; torchrun starts all again, and the run goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gapo_mega.whereabouts import PEERS_LOST
from tests.helpers.environment import environment
from tests.helpers.metrics_log import metrics
from tests.helpers.rank_runs import disturb, free_port, prepare, write_config

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    prepare(folder)
    return folder


def torchrun(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``gapo-mega train`` on two ranks of a torchrun of the user's own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    return subprocess.run(
        [*command, "-m", "gapo_mega.cli", "train", "--config", str(config)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def weights(run: Path) -> bytes:
    return (run / "hf" / "model.safetensors").read_bytes()


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(folder: Path) -> None:
    """Twice, in the store that its agent keeps: the addresses of dead processes are in there."""
    straight = torchrun(write_config(folder, "straight", STEPS), "--standalone")
    assert straight.returncode == 0, straight.stderr[-4000:]
    config = write_config(folder, "killed", STEPS)
    disturb(folder, rank=1, step=2, what="SIGKILL")
    static = ["--nnodes", "1", "--rdzv-backend", "static", "--master-port", str(free_port())]
    done = torchrun(config, "--max-restarts", "2", *static)
    assert done.returncode == 0, done.stderr[-6000:]
    assert (folder / "disturbed").exists() and "resumed from" in done.stderr
    assert metrics(folder / "killed") == metrics(folder / "straight")
    assert weights(folder / "killed") == weights(folder / "straight")
