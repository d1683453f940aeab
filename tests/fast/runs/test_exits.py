"""Exit codes that workers leave for their launcher."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gapo_mega.runs.exits import FOLDER, left_in, noted, status_of


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (None, 0),
        (SystemExit(), 0),
        (SystemExit(75), 75),
        (SystemExit("a reason"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a fault"), 1),
    ],
    ids=repr,
)
def test_every_end_of_a_command_leaves_its_code(
    end: BaseException | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    if end is None:
        with noted():
            assert FOLDER not in os.environ
    else:
        with pytest.raises(type(end)), noted():
            raise end
    assert left_in(tmp_path) == [code]


def test_a_code_that_was_not_written_is_none(tmp_path: Path) -> None:
    """A signal may come between making the file and filling it."""
    (tmp_path / "0").write_text("75")
    (tmp_path / "1").write_text("")
    assert left_in(tmp_path) == [75]


@pytest.mark.parametrize(
    ("codes", "status"),
    [([], 1), ([0, 0], 0), ([75, 0], 75), ([75, 75, -15], 75), ([75, 1], 1), ([0, -9], 1), ([-11, 0], 1)],
)
def test_a_launcher_ends_as_its_workers_agree(codes: list[int], status: int) -> None:
    assert status_of(codes) == status
