"""What the page says of the comparison stands in the committed results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.comparison import gains
from tests.helpers.environment import ROOT

KEPT = ROOT / "benchmarks" / "results" / "comparison"


def suites() -> dict[str, list[Path]]:
    """Sweeps of one base, by its name."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(KEPT.iterdir()):
        if folder.is_dir():
            found.setdefault(folder.name.partition("-")[0], []).append(folder)
    return found


def tables() -> Iterator[tuple[str, str]]:
    """Name of the committed file and what it must hold, of every suite, and of its judges if it has some."""
    for suite, folders in suites().items():
        yield f"{suite}.md", gains.table(gains.read(folders))
        if any(gains.is_there(run / gains.JUDGED) for _, _, run in gains.ended_runs(folders)):
            yield f"{suite}-judged.md", gains.table(gains.read(folders, gains.JUDGED))


@pytest.mark.parametrize(("name", "table"), tables())
def test_the_page_shows_the_table_of_the_committed_results(name: str, table: str) -> None:
    file = KEPT / name
    assert file.read_text(encoding="utf-8") == table, f"python -m benchmarks.comparison writes {file.name}"
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    missing = [line for line in table.splitlines() if line and line not in page]
    assert missing == []
