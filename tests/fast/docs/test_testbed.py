"""What the pages say of the test bed stands in the committed results."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.testbed import report
from benchmarks.testbed.methods import METHODS
from tests.helpers.environment import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "2026-11-29-testbed-cpu.json"


@pytest.fixture(scope="module")
def tables() -> list[str]:
    return report.tables(json.loads(RESULTS.read_text(encoding="utf-8")))


def numbers(row: str) -> str:
    """Cells of a table's row as one text, whatever their padding and emphasis."""
    return "|".join(cell.strip().strip("*") for cell in row.strip().strip("|").split("|"))


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == report.document(result)


def test_the_pages_show_rows_of_the_committed_tables(tables: list[str]) -> None:
    known = {numbers(row) for table in tables for row in table.splitlines()}
    labels = {"possible"} | {method.label for method in METHODS.values()}
    text = (ROOT / "docs" / "testbed.md").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("|")]
    shown = [row for row in rows if numbers(row).split("|")[0] in labels]
    assert len(shown) > 20
    assert [row for row in shown if numbers(row) not in known] == []


def test_the_committed_results_are_whole() -> None:
    """Twelve seeds and 200 steps, no method that is gone, no number that is missing."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert result["plan"] == {"seeds": 12, "steps": 200, "tuning_seeds": [100, 101, 102]}
    assert {cell["method"] for cell in result["cells"]} <= set(METHODS)
    assert all(len(cell["worst"]) == 12 for cell in result["cells"])
    assert not re.search(r"\b(NaN|Infinity)\b", RESULTS.read_text(encoding="utf-8"))
