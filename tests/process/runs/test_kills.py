"""A handful of the random kills of ``make survive``: at twelve places, and the run is the same in the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
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


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tells processes apart as Linux does")


class Session:
    """Kills with ``words``, in a process that works beside the test."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._results = folder / RESULTS
        self._log = folder / "log"
        command = [sys.executable, "-m", "tests.helpers.kills", *words, "--start", "forked"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--out", str(folder)], cwd=ROOT, env=environment(), stdout=log, stderr=log
            )

    def kills(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Every kill that hit, with its case; nothing is lost by any."""
        code = self.process.wait(timeout=1200)  # under load; ten times what it takes on an idle machine
        assert code == 0, self._log.read_text()[-6000:]
        assert of_cases(read(self._results)) == [of_code()]
        kills = kills_of(read(self._results))
        assert all(case["resumed"] and case["equal"] and not case["faults"] for _, case in kills)
        return kills


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Session]]:
    """Side by side: half of their time they wait for ranks that miss others."""
    words = {
        "random": ["--kills", "10", "--seed", SEED, "--layouts", "alone,2"],
        "background": ["--kills", "2", "--seed", BACKGROUND_SEED, "--layouts", "2-background"],
    }
    started = {
        name: Session(tmp_path_factory.mktemp(name), *more, "--again", "1") for name, more in words.items()
    }
    yield started
    for session in started.values():
        session.process.terminate()  # which ends what it has started
        session.process.wait()


def test_ten_kills_lose_nothing(sessions: dict[str, Session]) -> None:
    kills = sessions["random"].kills()
    assert len(kills) >= 10
    assert {case["ranks"] for _, case in kills} == {1, 2}
    signals = {kill["signal"].split()[0] for kill, _ in kills}
    assert signals == {"SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"}
    assert len({kill["hit"]["phase"] for kill, _ in kills}) > 5


def test_kills_while_a_checkpoint_is_written_in_the_background(sessions: dict[str, Session]) -> None:
    kills = sessions["background"].kills()
    assert [kill["hit"]["phase"] for kill, _ in kills] == ["background write", "background index"]
    assert [kill["signal"] for kill, _ in kills] == ["SIGKILL", "SIGHUP"]
    first, second = (kill["checkpoint"] for kill, _ in kills)
    assert first == 1 < second  # what the killed thread wrote is no checkpoint
