"""A run that is killed while a server draws its next step's responses."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.ahead_runs import built, lines
from tests.helpers.environment import ROOT, environment
from tests.helpers.table_policy import TablePolicy
from tests.helpers.vllm_protocol import table_server

RUN = """\
import os, signal, sys
from pathlib import Path
from tests.helpers.ahead_runs import built
from tests.helpers.table_policy import TablePolicy
engine = TablePolicy()
engine.at = {("update_policy", 3): lambda: os.kill(os.getpid(), signal.SIGKILL)}
built(Path(sys.argv[1]), sys.argv[2], engine, checkpoint={"every_steps": 1}).run()
"""


def test_a_killed_run_goes_on_as_the_undisturbed_one(tmp_path: Path) -> None:
    """What the server still draws for the killed run is nobody's."""
    whole, last = TablePolicy(), TablePolicy()
    with table_server() as server:
        assert built(tmp_path / "whole", server.url, whole).run()
    with table_server() as server:
        server.seconds_per_token = 0.05  # so that the killed run's requests are under way for a while
        command = [sys.executable, "-c", RUN, str(tmp_path / "run"), server.url]
        killed = subprocess.run(command, env=environment(), cwd=ROOT, timeout=120)
        assert killed.returncode == -signal.SIGKILL
        server.seconds_per_token = 0.0
        assert built(tmp_path / "run", server.url, last).run()
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert last.policy == whole.policy and last.table.equal(whole.table)
