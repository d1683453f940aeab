"""A handful of the random kills of ``make survive``: at ten places, and the run is the same in the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.environment import ROOT, environment
from tests.helpers.kills.session import RESULTS, read
from tests.helpers.kills.table import kills_of

# Ten kills of this seed are five runs, each disturbed twice: three of one process and two of two ranks. They
# meet eight phases and every signal.
SEED = "10492"


@pytest.mark.skipif(sys.platform != "linux", reason="tells processes apart as Linux does")
def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    words = ["--kills", "10", "--seed", SEED, "--layouts", "alone,2", "--start", "forked", "--again", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kills", *words, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,  # under load; ten times what it takes on an idle machine
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    kills = kills_of(read(tmp_path / RESULTS))
    assert len(kills) >= 10
    assert all(case["resumed"] and case["equal"] and not case["faults"] for _, case in kills)
    assert {case["ranks"] for _, case in kills} == {1, 2}
    signals = {kill["signal"].split()[0] for kill, _ in kills}
    assert signals == {"SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"}
    assert len({kill["hit"]["phase"] for kill, _ in kills}) > 5
