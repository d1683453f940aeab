"""Processes that are started together: they say so before they wait, and the launcher ends as they end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.environment import environment
from tests.helpers.tiny import tiny_llama


@pytest.mark.parametrize(("rank", "others"), [("0", "rank 1"), ("1", "rank 0")])
def test_a_process_whose_peers_are_missing_says_whom_it_waits_for(
    tmp_path: Path, rank: str, others: str
) -> None:
    tiny_llama(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    left = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "gapo_mega.cli", "convert", "--from", str(tmp_path / "model")]
    with subprocess.Popen(
        [*command, "--to", str(tmp_path / "out")],
        env=environment() | left,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            # Without the announcement this would read on until the process gives up, after half an hour.
            lines = iter(process.stderr.readline, "")
            said = next((line for line in lines if "waits for" in line), "")
            assert process.poll() is None
        finally:
            process.kill()
    assert f"rank {rank} of 2 waits for {others} at 127.0.0.1:{port}, at most 30 minutes" in said


# A stand-in for a command: at SIGTERM it ends as a training does that has written its checkpoint.
WORKER = """
import os, signal, sys, threading
from gapo_mega.runs.exits import noted

with noted():
    after = dict(zip("01", sys.argv[1:]))[os.environ["RANK"]]
    if after.isdigit():
        sys.exit(int(after))
    if after == "stops":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    open(f"{sys.argv[0]}-{os.environ['RANK']}", "w").close()
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("workers", "sent", "code"),
    [
        (("stops", "stops"), True, 75),
        (("waits", "waits"), True, 1),  # a signal has ended them before there was anything to keep
        (("2", "waits"), False, 2),  # torchrun ends the second one
        (("69", "69"), False, 69),
        (("2", "stops"), False, 1),
    ],
)
def test_the_launcher_ends_as_its_workers_end(
    tmp_path: Path, workers: tuple[str, str], sent: bool, code: int
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "gapo_mega.runs.local_torchrun", "--nproc-per-node", "2"]
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen(
        [*command, str(worker), *workers], env=environment() | {"TMPDIR": str(tmp_path / "tmp")}
    ) as process:
        if sent:
            while len(list(tmp_path.glob("worker.py-*"))) < 2:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        assert process.wait(300) == code
    assert not list((tmp_path / "tmp").glob("gapo-mega-*"))


def test_a_user_s_error_on_all_ranks_is_the_launcher_s(tmp_path: Path) -> None:
    """The first process cannot see it: there the model is still whole."""
    tiny_llama(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "gapo_mega.cli", "convert", "--from", str(tmp_path / "model")]
    done = subprocess.run(
        [*command, "--to", str(tmp_path / "out"), "--format", "megatron", "--nproc", "2"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
