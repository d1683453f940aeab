"""Where everything hangs there is nobody to miss anybody: each process ends itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gapo_mega.whereabouts import PEERS_LOST
from tests.helpers.environment import environment
from tests.helpers.rank_runs import disturb, prepare, write_config

LIMIT = {"timeout_minutes": 0.5, "phase_minutes": 0.5}


def train(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gapo_mega.cli", "train", "--config", str(config)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_reward_that_never_returns_ends_the_only_process_and_the_run_goes_on(tmp_path: Path) -> None:
    prepare(tmp_path)
    config = write_config(tmp_path, "alone", 3, parallel=LIMIT)
    disturb(tmp_path, rank=0, step=3, what="sleep")
    done = train(config)
    assert done.returncode == PEERS_LOST, done.stderr[-4000:]
    assert "has been in step 3, score since " in done.stderr
    assert "has not got on for 30 s (parallel.phase_minutes); this process ends" in done.stderr
    again = train(config)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "step_00000002: 2 of 3 steps done" in again.stderr
