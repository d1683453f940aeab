"""What is kept of cases, and their table."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.kills import table
from tests.helpers.kills.__main__ import main
from tests.helpers.kills.session import RESULTS, Session, read

STATE = version("gapo-mega")  # a fast test starts no git


def kill(phase: str, signal: str, hit: bool = True) -> dict[str, Any]:
    return {"phase": phase, "signal": signal, "target": "rank", "hit": {"phase": phase} if hit else None}


def case(number: int, kills: list[dict[str, Any]], equal: bool = True) -> dict[str, Any]:
    faults = [] if equal else ["metrics.jsonl differs"]
    about = {"state": STATE, "seed": 1, "case": number, "layout": "2", "start": "forked", "kills": kills}
    return {**about, "resumed": True, "equal": equal, "faults": faults}


FOUND = [
    case(0, [kill("score", "SIGKILL"), kill("export", "SIGINT", hit=False)]),
    case(1, [kill("score", "SIGKILL")], equal=False),
    case(2, [kill("report", "SIGTERM twice")]),
]


def write(path: Path) -> None:
    path.write_text("".join(json.dumps(found) + "\n" for found in FOUND) + '{"seed": 1, "ca')


def test_a_line_that_was_cut_off_is_no_case(tmp_path: Path) -> None:
    write(tmp_path / RESULTS)
    assert read(tmp_path / RESULTS) == FOUND


def test_what_is_known_is_not_done_again(tmp_path: Path) -> None:
    """Else this would start runs, and make their folders."""
    write(tmp_path / RESULTS)
    session = Session(tmp_path, 1, ("2",), "forked", workers=1)
    session.run(3)
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS]
    assert [failed["case"] for failed in session.failed] == [1]


def test_cases_of_other_code_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else one table would count kills of different code."""
    write(tmp_path / RESULTS)
    (tmp_path / "old.jsonl").write_text(json.dumps({**FOUND[0], "state": "0ld-dirty"}) + "\n")
    files = [str(tmp_path / RESULTS), str(tmp_path / "old.jsonl")]
    assert main(["--table", str(tmp_path / "table"), *files]) == 2
    assert f"found cases of the code {', '.join(sorted(['0ld-dirty', STATE]))}" in capsys.readouterr().err
    (tmp_path / "old.jsonl").rename(tmp_path / RESULTS)
    assert main(["--out", str(tmp_path), "--kills", "1"]) == 2
    assert f"{RESULTS}, with cases of the code 0ld-dirty, accepted: of {STATE}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS]


def test_the_table(tmp_path: Path) -> None:
    write(tmp_path / RESULTS)
    assert main(["--table", str(tmp_path / "table"), str(tmp_path / RESULTS)]) == 0
    written = (tmp_path / "table.md").read_text()
    assert table.text(FOUND) in written
    assert f"State of the code: {STATE}." in written
    assert "3 kills in 3 runs; resumed after 3, equal in the end after 2." in written
    assert "| score | 2 / 2 / 1 |  | 2 / 2 / 1 |" in written  # SIGKILL, SIGTERM twice, all
    assert "| export |  |  |  |" in written
    assert json.loads((tmp_path / "table.json").read_text()) == FOUND
