"""Processes that wait for others: they say so before they wait."""

from __future__ import annotations

import socket
import subprocess
import sys
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
