"""The versions that the tests have run with. docs/versions.md has the same table, which a test compares."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Versions:
    """One environment: what constraints.txt installs for a Python, newest first in ``TESTED``."""

    python: str  # without the patch level
    megatron_core: str
    torch: str
    transformers: str

    def __str__(self) -> str:
        python, megatron_core, torch, transformers = astuple(self)
        return f"Python {python}, megatron-core {megatron_core}, torch {torch}, transformers {transformers}"


TESTED = (
    Versions("3.13", "0.19.2", "2.13.0", "5.23.0"),
    Versions("3.12", "0.19.2", "2.13.0", "5.23.0"),
    Versions("3.11", "0.16.1", "2.13.0", "5.23.0"),
    Versions("3.10", "0.16.1", "2.13.0", "5.20.2"),
)


def row_of(python: str) -> Versions | None:
    """The row of a Python (``3.12`` or ``3.12.1``); None if no test has run with it."""
    short = ".".join(python.split(".")[:2])
    return next((row for row in TESTED if row.python == short), None)
