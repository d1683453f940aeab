"""Which code is killed: a table counts kills of one state of it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from tests.helpers.environment import ROOT

UNKNOWN = "not recorded"  # of files from before it was


def of_code() -> str:
    """What git calls this checkout, or the package's version where git says nothing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return version("gapo-mega")
    return done.stdout.strip()


def of_cases(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """The states that cases are of, each once."""
    return sorted({case.get("state", UNKNOWN) for case in found})
