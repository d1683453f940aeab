"""The loggers of this folder by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gapo_mega.runs.loggers as package
from gapo_mega.registry import construct, implementations
from gapo_mega.runs.loggers.base import Logger


def loggers() -> dict[str, type[Logger]]:
    """Every concrete ``Logger`` that a file of this folder defines, by its ``name``."""
    return {logger.name: logger for logger in implementations(package, Logger)}


def build(section: str, name: str, options: Mapping[str, Any]) -> Logger:
    """The logger ``name``, or the user's own, with its options.

    ``section`` is the part of the configuration that the names come from. Raises ``ValueError`` for a name or
    an option that does not exist, and for options that are out of range.
    """
    return construct(section, loggers(), Logger, name, options)
