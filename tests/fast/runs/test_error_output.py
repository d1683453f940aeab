"""What a process says of its end is one piece, also where every piece is written at once."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest

from gapo_mega.cli import main
from gapo_mega.credentials import revealed

TOKEN = "visible-token"


class Unbuffered(io.RawIOBase):
    """A terminal: every write is shown at once."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.pieces.append(bytes(data).decode())
        return len(data)


def pieces_of(act: Callable[[], object]) -> list[str]:
    """What ``act`` writes to standard error in an interpreter that ``-u`` was given to, one for each call."""
    raw = Unbuffered()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.TextIOWrapper(cast(Any, raw), write_through=True))
        act()
        return raw.pieces


@pytest.fixture(autouse=True)
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is after the test: the command replaces it."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def test_print_writes_the_end_of_a_line_apart() -> None:
    """So it is seen here where something is not one piece."""
    assert pieces_of(lambda: print("error: other", file=sys.stderr)) == ["error: other", "\n"]


def test_an_error_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gapo-mega", "plan", "--config", "/nowhere/run.yaml"])

    def act() -> None:
        with pytest.raises(SystemExit):
            main()

    assert pieces_of(act) == ["error: config: file /nowhere/run.yaml not found; accepted: a YAML file\n"]


def test_without_standard_error_the_exit_code_is_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under ``2>&-`` there is none."""
    monkeypatch.setattr(sys, "argv", ["gapo-mega", "plan", "--config", "/nowhere/run.yaml"])
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().out == "error: config: file /nowhere/run.yaml not found; accepted: a YAML file\n"
    )


def test_a_traceback_is_one_piece_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    monkeypatch.setenv("GAPO_MEGA_TRACEBACK", "1")
    revealed("here", {"token": "env:MY_TOKEN"})
    monkeypatch.setattr(sys, "argv", ["gapo-mega", "plan", "--config", f"/nowhere/{TOKEN}"])

    def act() -> None:
        with pytest.raises(ValueError, match="config: file") as raised:
            main()
        sys.excepthook(raised.type, raised.value, raised.tb)

    (text,) = pieces_of(act)
    assert text.startswith("Traceback (most recent call last):\n") and text.count("\n") > 4
    assert text.endswith("/nowhere/*** not found; accepted: a YAML file\n") and TOKEN not in text
