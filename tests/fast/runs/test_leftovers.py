"""What killed runs left half written: the next run of the directory removes it and says so."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from gapo_mega.scratch import MADE_BY
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.held_runs import snapshot, start, stopped

FILES = (
    ".metrics.partial.jsonl",
    ".config.partial.yaml",
    "..gapo-mega.partial.json",
    ".summary.partial.json",
    # The whole files are not there, and perhaps never will be.
    ".metrics.cut-3.partial.jsonl",
    "responses/.step_00000009.partial.jsonl",
    "report/.index.partial.html",
    "report/.heldout.partial.png",
)


def leave_leftovers(directory: Path) -> list[Path]:
    """As kills at many moments would."""
    export, incomplete = (
        directory / ".hf.partial-abcdefgh",
        directory / "checkpoints" / ".incomplete-step_00000009",
    )
    for path in (export, incomplete, directory / "report", directory / "responses"):
        path.mkdir(parents=True)
    (export / MADE_BY).write_text(json.dumps({"host": socket.gethostname(), "pid": 1}))
    (incomplete / "weights").write_bytes(bytes(3_000_000))
    files = [directory / name for name in FILES]
    for file in files:
        file.write_text("half")
    return [export, incomplete, *files]


def test_the_next_run_removes_them_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopped(tmp_path)
    found = leave_leftovers(tmp_path)
    mine = tmp_path / ".notes.partial.txt"
    mine.write_text("mine")
    assert start(tmp_path)[0]
    assert not any(path.exists() for path in found) and mine.read_text() == "mine"
    said = [line for line in caplog.messages if line.startswith(f"removed {tmp_path}")]
    assert len(said) == len(found) and all("which a killed process had not finished" in line for line in said)
    assert f"removed {found[1]} (3.0 MB)" in caplog.text


def test_a_refused_run_removes_nothing(tmp_path: Path) -> None:
    stopped(tmp_path)
    leave_leftovers(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="seed: found 7"):
        start(tmp_path, seed=7)
    assert snapshot(tmp_path) == before


def test_what_another_run_still_writes_stays(tmp_path: Path) -> None:
    """The second run in a directory is refused before it looks."""
    seen: list[bool] = []

    def second() -> None:
        found = leave_leftovers(tmp_path)
        with pytest.raises(ValueError, match="is in use by"):
            start(tmp_path)
        seen.append(all(path.exists() for path in found))

    start(tmp_path, FakeEngine(at={("update_policy", 2): second, ("update_policy", 3): terminate}))
    assert seen == [True]


def test_in_a_directory_of_no_run_everything_stays(tmp_path: Path) -> None:
    path = tmp_path / ".summary.partial.json"
    path.write_text("mine")
    assert start(tmp_path)[0]
    assert path.read_text() == "mine"
