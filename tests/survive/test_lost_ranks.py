"""Ranks that die, stop or hang: the others name them and end; torchrun restarts all, and the run goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gapo_mega.whereabouts import PEERS_LOST
from tests.helpers import two_hosts
from tests.helpers.environment import environment
from tests.helpers.metrics_log import metrics
from tests.helpers.rank_runs import disturb, free_port, prepare, write_config

STEPS = 4


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


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """The directory of a run of two ranks that nothing disturbed."""
    done = torchrun(write_config(folder, "straight", STEPS), "--standalone")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "straight"


def weights(run: Path) -> bytes:
    return (run / "hf" / "model.safetensors").read_bytes()


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(folder: Path, straight: Path) -> None:
    """In the store that its agent keeps: the addresses of dead processes are in there."""
    config = write_config(folder, "killed", STEPS)
    disturb(folder, rank=1, step=2, what="SIGKILL")
    static = ["--nnodes", "1", "--rdzv-backend", "static", "--master-port", str(free_port())]
    done = torchrun(config, "--max-restarts", "2", *static)
    assert done.returncode == 0, done.stderr[-6000:]
    assert (folder / "disturbed").exists() and "resumed from" in done.stderr
    assert metrics(folder / "killed") == metrics(straight)
    assert weights(folder / "killed") == weights(straight)


def start(config: Path, port: int, rank: int) -> subprocess.Popen[str]:
    """A rank that no torchrun looks after: it must end by itself."""
    job = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "gapo_mega.cli", "train", "--config", str(config)],
        env=environment() | job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_both(config: Path) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [start(config, port, rank) for rank in (0, 1)]


def test_a_stopped_rank_is_found_and_named(folder: Path) -> None:
    """SIGSTOP: its connections stay open. When it goes on, it finds that the others have ended."""
    limits = {"timeout_minutes": 5, "silence_minutes": 0.2}
    config = write_config(folder, "stopped", STEPS, parallel=limits)
    disturb(folder, rank=1, step=2, what="SIGSTOP")
    first, second = start_both(config)
    try:
        said, _ = first.communicate(timeout=300)
        assert first.returncode == PEERS_LOST, said[-4000:]
        assert "has not heard of rank 1 for 12 s (parallel.silence_minutes); last heard: rank 1 (host" in said
        assert f"process {second.pid}) is in step 2, score since " in said
        assert second.poll() is None and psutil.Process(second.pid).status() == psutil.STATUS_STOPPED
        second.send_signal(signal.SIGCONT)
        said, _ = second.communicate(timeout=120)
        assert second.returncode == PEERS_LOST, said[-4000:]
        assert "rank 1 on " in said and "rank 0" in said
    finally:
        for process in (first, second):
            process.kill()


def test_a_rank_that_hangs_in_a_reward_ends_with_the_one_that_waits_for_it(folder: Path) -> None:
    """It gives signs of life, so it may be slow: until the others have waited for the time limit."""
    limits = {"timeout_minutes": 1, "silence_minutes": 0.2}  # the first also bounds how they meet, when busy
    config = write_config(folder, "hanging", STEPS, parallel=limits)
    disturb(folder, rank=1, step=2, what="sleep")
    first, second = start_both(config)
    try:
        said, _ = first.communicate(timeout=400)
        assert first.returncode == PEERS_LOST, said[-4000:]
        assert "rank 0 on " in said and "lost the others" in said and "into step 2, " in said
        assert f"process {second.pid}) is in step 2, score since " in said
        assert "the run can go on from step 1" in said
        said, _ = second.communicate(timeout=120)
        assert second.returncode == PEERS_LOST, said[-4000:]
        assert "rank 1 ends, because another rank did: rank 0 on " in said and "step 2, " in said
    finally:
        for process in (first, second):
            process.kill()


def test_two_hosts_whose_link_is_cut_or_slow_and_of_which_one_is_killed(folder: Path, straight: Path) -> None:
    """Each end names the other, and the restart goes on: in the end the weights are those of a quiet run."""
    reason = two_hosts.missing()
    if reason is not None:
        pytest.skip(reason)
    limits = {"timeout_minutes": 5, "silence_minutes": 0.2}
    cut, killed, last = two_hosts.run(write_config(folder, "hosts", STEPS, parallel=limits))

    assert cut["codes"] == [PEERS_LOST, PEERS_LOST], cut["said"]
    left, right = cut["said"]
    assert "rank 0 on left-host" in left and "has not heard of rank 1 for 12 s" in left
    assert "last heard: rank 1 (host right-host, process " in left and "is in step 2, score" in left
    assert "rank 1 on right-host" in right and "the job's store, and with it rank 0 for 12 s" in right
    assert "last heard: rank 0 (host left-host, process " in right and "is in step 2, " in right

    assert killed["codes"] == [PEERS_LOST, -signal.SIGKILL], killed["said"]
    assert "rank 0 on left-host lost the others" in killed["said"][0]
    assert "rank 1 (host right-host, process " in killed["said"][0]
    assert "resumed from" in killed["said"][0] and "1 of 4 steps done" in killed["said"][0]

    assert last["codes"] == [0, 0], last["said"]
    assert "2 of 4 steps done" in last["said"][0]
    assert metrics(folder / "hosts") == metrics(straight)
    assert weights(folder / "hosts") == weights(straight)
