"""The matrix's own arithmetic: what is counted, what is kept, what the table and the exit status say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from gapo_mega.versions import TESTED
from tools import matrix
from tools.matrix import Outcome, Results

PASSED = {"passed": 3, "skipped": 1}


def outcome(**facts: object) -> Outcome:
    made = Outcome(TESTED[0], found="0.19.2 2.13.0", counts=Counter(PASSED))
    for name, value in facts.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([outcome()], 0),
        ([outcome(), outcome(failed=["tests/engine/a.py"])], 1),
        ([outcome(), outcome(why_not="no Python 3.13")], 2),
        # A failure is worse than what did not run.
        ([outcome(why_not="no Python 3.13"), outcome(failed=["tests/engine/a.py"])], 1),
    ],
)
def test_exit_status(outcomes: list[Outcome], status: int) -> None:
    assert matrix.status(outcomes) == status


def test_table() -> None:
    rows = [
        outcome(seconds=61.4),
        outcome(why_not="no Python 3.13", found=""),
        outcome(failed=["a.py", "b.py"]),
    ]
    head, *lines = matrix.table(rows).splitlines()
    assert head.split() == ["python", "megatron-core", "torch", "tests", "seconds", "result"]
    assert lines[0].split() == ["3.13", "0.19.2", "2.13.0", "3", "passed,", "1", "skipped", "61", "passed"]
    assert lines[1].endswith("NOT RUN: no Python 3.13") and "3 passed" not in lines[1]
    assert lines[2].endswith("FAILED: a.py, b.py")


def test_a_python_that_cannot_be_had_is_told_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "HOME", tmp_path / "matrix")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.main(["--versions", "3.13", "3.10"]) == 2
    reason = "NOT RUN: no Python 3.10 on PATH or among pyenv's"
    assert reason in capsys.readouterr().out
    assert reason in (tmp_path / "matrix" / "table.txt").read_text()
    table = json.loads((tmp_path / "matrix" / "table.json").read_text())
    assert [(row["row"]["python"], row["verdict"][:7]) for row in table] == [
        ("3.13", "NOT RUN"),
        ("3.10", "NOT RUN"),
    ]


def test_the_table_s_file_has_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "HOME", tmp_path)
    matrix.report([outcome(seconds=2.0)])
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["counts"] == PASSED and row["row"]["megatron_core"] == TESTED[0].megatron_core
    assert row["verdict"] == "passed"


def test_counts_of_a_report(tmp_path: Path) -> None:
    """A report as pytest writes it."""
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/></testsuites>'
    )
    assert matrix.counted(report) == Counter(passed=4, failed=3, skipped=3)
    assert matrix.told(matrix.counted(report)) == "4 passed, 3 failed, 3 skipped"
    assert matrix.counted(tmp_path / "none.xml") == Counter()  # pytest was killed


def test_results_hold_for_the_files_that_were_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gapo_mega").mkdir()
    code = tmp_path / "gapo_mega" / "a.py"
    code.write_text("a = 1\n")
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    path = tmp_path / "results.json"
    Results(path).add("tests/engine/test_a.py", Counter(PASSED))
    assert Results(path).passed == {"tests/engine/test_a.py": PASSED}
    (tmp_path / "gapo_mega" / "a.cpython-312.so").write_bytes(b"built")
    assert Results(path).passed == {"tests/engine/test_a.py": PASSED}  # built from other files
    code.write_text("a = 2\n")
    assert Results(path).passed == {}
    code.write_text("a = 1\n")
    code.rename(code.with_name("b.py"))
    assert Results(path).passed == {}
    assert json.loads(path.read_text())["passed"]  # until the next result


def test_the_tests_of_the_engine_are_all_there() -> None:
    found = set(matrix.test_files())
    for part in ("gradients/test_layouts", "checkpoint/test_run", "checkpoint/test_weights", "test_critic"):
        assert f"tests/process/megatron/{part}.py" in found
    assert "tests/process/megatron/generation/test_generation.py" in found
    assert "tests/engine/megatron/gradients/test_reference.py" in found


def test_versions_without_a_row_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["--versions", "3.13", "3.9"])
    assert "--versions: found 3.9; accepted: 3.13, 3.12, 3.11, 3.10" in capsys.readouterr().err
