"""A handful of the random kills of ``make survive``: at twelve places, and the run is the same in the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.environment import ROOT, environment
from tests.helpers.kills.session import RESULTS, read
from tests.helpers.kills.state import of_cases, of_code
from tests.helpers.kills.table import kills_of

# Ten kills of this seed are five runs, each disturbed twice: three of one process and two of two ranks. They
# meet eight phases and every signal.
SEED = "10492"
# One run: rank 0 is killed in the thread that writes its second checkpoint, and then told to end where the
# index of the next one is made.
BACKGROUND_SEED = "7601"


def kill(folder: Path, *words: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every kill that hit, with its case; nothing is lost by any."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kills", *words, "--start", "forked", "--out", str(folder)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,  # under load; ten times what it takes on an idle machine
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert of_cases(read(folder / RESULTS)) == [of_code()]
    kills = kills_of(read(folder / RESULTS))
    assert all(case["resumed"] and case["equal"] and not case["faults"] for _, case in kills)
    return kills


@pytest.mark.skipif(sys.platform != "linux", reason="tells processes apart as Linux does")
def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    kills = kill(tmp_path, "--kills", "10", "--seed", SEED, "--layouts", "alone,2", "--again", "1")
    assert len(kills) >= 10
    assert {case["ranks"] for _, case in kills} == {1, 2}
    signals = {kill["signal"].split()[0] for kill, _ in kills}
    assert signals == {"SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"}
    assert len({kill["hit"]["phase"] for kill, _ in kills}) > 5


@pytest.mark.skipif(sys.platform != "linux", reason="tells processes apart as Linux does")
def test_kills_while_a_checkpoint_is_written_in_the_background(tmp_path: Path) -> None:
    words = ["--kills", "2", "--seed", BACKGROUND_SEED, "--layouts", "2-background", "--again", "1"]
    kills = kill(tmp_path, *words)
    assert [kill["hit"]["phase"] for kill, _ in kills] == ["background write", "background index"]
    assert [kill["signal"] for kill, _ in kills] == ["SIGKILL", "SIGHUP"]
    first, second = (kill["checkpoint"] for kill, _ in kills)
    assert first == 1 < second  # what the killed thread wrote is no checkpoint
