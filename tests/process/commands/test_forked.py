"""Commands that tests start as forks end and print as an interpreter's do, alone and with local ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.commands import Command, run
from tests.helpers.environment import environment
from tests.helpers.run_files import write_run_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every command is an interpreter's")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["train", "--config", "run.yaml", "steps=0"],
        ["train", "--config", "run.yaml", "loss.name=mine:Missing", "--nproc", "2"],
        ["audit", "run"],
    ],
    ids=" ".join,
)
def test_code_and_outputs_are_those_of_an_interpreter(arguments: list[str], tmp_path: Path) -> None:
    write_run_file(tmp_path)
    (tmp_path / "mine.py").write_text("import sys\nprint(sys.path[0], file=sys.stderr)\n")
    done = subprocess.run(
        [sys.executable, "-m", "gapo_mega.cli", *arguments],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    forked = run(*arguments, cwd=tmp_path)
    assert (forked.returncode, forked.stdout, forked.stderr) == (done.returncode, done.stdout, done.stderr)


def test_signals_reach_the_launcher_and_its_ranks(tmp_path: Path) -> None:
    """SIGTERM in the middle is a checkpoint, and code 75; SIGKILL is told as by ``Popen``."""
    write_run_file(tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    words = ["train", "--config", tmp_path / "run.yaml", "steps=1000"]
    for options, number, code in (
        (["--nproc", 2], signal.SIGTERM, 75),
        (["--overwrite"], signal.SIGKILL, -signal.SIGKILL),
    ):
        command = Command(*words, *options)
        begun = time.time()
        while not (log.is_file() and log.stat().st_size and log.stat().st_mtime > begun):
            assert command.poll() is None, command.communicate()[0]
            time.sleep(0.02)
        command.send_signal(number)
        output, errors = command.communicate()
        assert command.returncode == code, output[-4000:]
        assert errors == ""
        command.kill()  # of what has ended: nothing
