"""Local processes of ``--nproc`` meet on this machine's loopback: nobody else reaches where they meet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.environment import environment

WORKER = """
import json, os, sys
import psutil
import torch.distributed as dist

dist.init_process_group("gloo")
dist.barrier()
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
launcher = psutil.Process().parent()
listening = [
    connection.laddr.ip
    for process in (launcher, *launcher.children(recursive=True))
    for connection in process.net_connections()
    if connection.status == psutil.CONN_LISTEN
]
with open(f"{sys.argv[1]}/{dist.get_rank()}-{'first' if first else 'again'}", "w") as file:
    json.dump(listening, file)
dist.barrier()
sys.exit(3 if first else 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback has another name elsewhere")
def test_all_that_listens_is_on_the_loopback_also_after_a_restart(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "gapo_mega.runs.local_torchrun", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "1", str(tmp_path / "worker.py"), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("0-first", "1-first", "0-again", "1-again"):
        found = json.loads((tmp_path / name).read_text())
        assert found and {*found} == {"127.0.0.1"}
