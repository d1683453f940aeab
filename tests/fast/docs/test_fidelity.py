"""docs/fidelity.md names tests and examples that are there."""

from __future__ import annotations

import re

import pytest

from tests.helpers.environment import ROOT

TEXT = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:tests/[\w/]+/)?test_\w+\.py)(?:::(test_\w+))?(?:\.\.\.)?`", TEXT)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_named_test_is_there(file: str, test: str) -> None:
    found = [ROOT / file] if "/" in file else list((ROOT / "tests" / "fast").rglob(file))
    assert len(found) == 1 and found[0].is_file()
    assert not test or f"def {test}" in found[0].read_text(encoding="utf-8")


def test_tests_are_named() -> None:
    assert len(NAMED) > 15


def test_every_file_of_the_papers_runs_is_named() -> None:
    for file in (ROOT / "examples" / "paper").glob("*.yaml"):
        assert f"`{file.name}`" in TEXT, file.name
