"""``gapo_mega.__version__`` is that of the installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

import gapo_mega

ROOT = Path(__file__).resolve().parents[2]


def test_version_is_the_projects() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{gapo_mega.__version__}"\n' in project


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'version'"):
        gapo_mega.version  # noqa: B018
