"""Temporary files of processes that are killed: the next run on this machine removes them and says so."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gapo_mega.scratch import remove_left
from tests.helpers.environment import environment
from tests.helpers.held_runs import start

# Rows of a data set, a server's folder, a throughput run's directory, and a megabyte on its way to a server.
USER = """\
import sys, tempfile, threading
from pathlib import Path
import torch
from gapo_mega.data.named import NamedSplit, read_named
from gapo_mega.rollout.servers.process import ServerProcess
from gapo_mega.config import VllmConfig
from gapo_mega.rollout.servers.transfers.files import Files
from gapo_mega.scratch import scratch

class Server:
    def begin(self, end):
        pass

    def take(self, update, end):
        print(Path(update["path"]).parent, *Path(tempfile.gettempdir()).iterdir(), flush=True)
        threading.Event().wait()

rows = read_named(NamedSplit("data.source", sys.argv[1], "data.split", "train"))
server = ServerProcess(sys.executable, [])
with scratch(Path(tempfile.gettempdir()), ".throughput-"):
    Files(VllmConfig()).send([Server()], [("weight", torch.zeros(1 << 18))], "label", 0.0)
"""


@contextmanager
def using(data: Path, temporary: Path) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """A process that has temporary files, and their directories, that of weights first."""
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(data)],
        env=environment() | {"TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, [Path(word) for word in process.stdout.readline().split()]
        finally:
            process.kill()
            process.wait()
            remove_left(Path("/dev/shm"), "gapo-mega-weights-")


def kinds(paths: list[Path]) -> set[str]:
    return {path.name.rpartition("-")[0] for path in paths}


def test_the_next_run_removes_what_a_killed_process_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "a"}\n')
    shared = tmp_path / "temporary"
    with using(data, shared) as (killed, found), using(data, tmp_path / "other") as (_, living):
        here = [living[0], *(path.rename(shared / path.name) for path in living[1:])]
        killed.kill()
        killed.wait()
        assert kinds(found) == {"gapo-mega-weights", "gapo-mega-data", "gapo-mega-vllm", ".throughput"}
        assert all(path.is_dir() for path in found)
        mine = shared / "gapo-mega-notes"
        mine.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(shared))
        assert start(tmp_path / "run")[0]
        remove_left(shared, ".throughput-")  # as the next measurement beside it does
        assert not any(path.exists() for path in found)
        assert all(path.is_dir() for path in (mine, *here))
    said = [line for line in caplog.messages if any(line.startswith(f"removed {path} (") for path in found)]
    assert len(said) == len(found)
    assert any(line.startswith(f"removed {found[0]} (1.0 MB)") for line in said)
