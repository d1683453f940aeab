"""Every promise of SECURITY.md names a test, and the tests are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_named_tests_are_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [
        row for row in text.partition("## What holds these promises")[2].splitlines() if row.startswith("| ")
    ]
    assert len(rows) > 8
    for row in rows[1:]:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        # A file alone would say that something in there may hold it.
        assert named and row.count("`tests/") == len(named), row
        for file, test in named:
            content = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {test}(" in content, (file, test)
