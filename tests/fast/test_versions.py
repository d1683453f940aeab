"""The table of tested versions is what is installed, what the page shows, and what the package accepts."""

from __future__ import annotations

import re
from dataclasses import astuple
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

from gapo_mega.versions import TESTED, Versions, row_of

ROOT = Path(__file__).resolve().parents[2]


def pinned(python: str) -> dict[str, str]:
    """What pip installs of constraints.txt for a Python, by packaging's own reading of the markers."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        marker: Marker | None = requirement.marker
        if marker is None or marker.evaluate({"python_version": python}):
            assert requirement.name not in found, f"two versions of {requirement.name} for Python {python}"
            (specifier,) = requirement.specifier
            found[requirement.name] = specifier.version
    return found


@pytest.mark.parametrize("row", TESTED, ids=lambda row: row.python)
def test_constraints_install_what_is_tested(row: Versions) -> None:
    installed = pinned(row.python)
    found = Versions(row.python, *(installed[name] for name in ("megatron-core", "torch", "transformers")))
    assert found == row


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = [tuple(re.findall(r"[\d.]+", line)) for line in page.splitlines() if line.startswith("| 3.")]
    assert rows == [astuple(row) for row in TESTED]


def test_pip_accepts_what_is_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("megatron-core", "torch", "transformers"):
        (line,) = re.findall(rf'^    "({name}>.*)",$', project, re.MULTILINE)
        accepted = Requirement(line).specifier
        assert all(getattr(row, name.replace("-", "_")) in accepted for row in TESTED)
    core = Requirement(re.findall(r'"(megatron-core.*)"', project)[0]).specifier
    assert "0.20.0" not in core and "0.16.0" not in core and "0.17.1" in core and "0.18.0" in core
    classified = re.findall(r"Python :: (3\.\d+)", project)
    assert sorted(classified, key=Version, reverse=True) == [row.python for row in TESTED]


@pytest.mark.parametrize(
    ("python", "expected"), [("3.12", "0.19.2"), ("3.12.1", "0.19.2"), ("3.10.13", "0.16.1")]
)
def test_a_python_has_its_row(python: str, expected: str) -> None:
    row = row_of(python)
    assert row is not None and row.megatron_core == expected


@pytest.mark.parametrize("python", ["3.9", "3.14.0", "3.1", "3"])
def test_other_pythons_have_none(python: str) -> None:
    assert row_of(python) is None
