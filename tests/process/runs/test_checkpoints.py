"""A process that is killed while it writes a checkpoint."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gapo_mega.engine.base import Layout
from gapo_mega.runs.checkpoints import CheckpointFolder

ALONE = Layout(world=1, rank=0, tensor=1, pipeline=1, data=1, data_rank=0, tensor_rank=0, pipeline_rank=0)


def folder(directory: Path, keep: int = 2) -> CheckpointFolder:
    return CheckpointFolder(directory, keep, ALONE, lambda: None)


def write_numbers(directory: Path, count: int = 20) -> None:
    (directory / "sub").mkdir()
    for number in range(count):
        (directory / "sub" / f"{number}.txt").write_text(str(number))


KILLED = """
import sys, itertools
from pathlib import Path
from gapo_mega.runs.checkpoints import CheckpointFolder
from gapo_mega.engine.base import Layout
def write_numbers(directory):
    (directory / "sub").mkdir()
    for number in range(20):
        (directory / "sub" / f"{number}.txt").write_text(str(number))
folder = CheckpointFolder(Path(sys.argv[1]), 2, Layout(1, 0, 1, 1, 1, 0, 0, 0), lambda: None)
for step in itertools.count(1):
    folder.save(step, write_numbers)
    if step == 3:
        print("started", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.031])
def test_killed_while_saving(tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        time.sleep(delay)
        child.kill()
    saved = folder(tmp_path)
    newest = saved.latest()
    assert newest is not None
    assert 1 <= len(saved.steps()) <= 3  # 3: killed before the oldest went
    assert len(list((newest / "sub").iterdir())) == 20
    saved.save(10**6, write_numbers)
    assert sorted(path.name for path in tmp_path.iterdir()) == [newest.name, "step_01000000"]
