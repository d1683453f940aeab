"""What the page says of the comparison stands in the committed results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.comparison import accuracy, gains
from tests.helpers.environment import ROOT

KEPT = ROOT / "benchmarks" / "results" / "comparison"


def suites() -> dict[str, list[Path]]:
    """Sweeps of one base, by its name."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(KEPT.iterdir()):
        if folder.is_dir():
            found.setdefault(folder.name.partition("-")[0], []).append(folder)
    return found


def tables() -> Iterator[tuple[str, str, str]]:
    """Suite, name of its committed table, and the answers that it is of: also the judges' if it has some."""
    for suite, folders in suites().items():
        yield suite, f"{suite}.md", gains.ANSWERS
        if any(gains.is_there(run / gains.JUDGED) for _, _, run in gains.ended_runs(folders)):
            yield suite, f"{suite}-judged.md", gains.JUDGED


@pytest.mark.parametrize(("suite", "name", "answers"), tables())
def test_the_page_shows_the_table_of_the_committed_results(suite: str, name: str, answers: str) -> None:
    file, table = KEPT / name, gains.table(gains.read(suites()[suite], answers))
    assert file.read_text(encoding="utf-8") == table, f"python -m benchmarks.comparison writes {file.name}"
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    missing = [line for line in table.splitlines() if line and line not in page]
    assert missing == []


def test_the_reward_models_accuracy_is_that_of_the_committed_scores() -> None:
    table = accuracy.table(accuracy.read(KEPT / "hh-rewards.json"))
    assert (KEPT / "hh-rewards.md").read_text(encoding="utf-8") == table
    assert table in (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
