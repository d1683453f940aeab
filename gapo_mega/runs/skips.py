"""Warns of gradients that are zero or not finite, counts skipped updates, and at a limit stops the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gapo_mega.engine.base import GradientReport

logger = logging.getLogger(__name__)


class Skips:
    """Names objectives without a usable gradient; stops after too many skipped updates in a row."""

    def __init__(self, names: Sequence[str], limit: int) -> None:
        """``limit``: ``gradients.max_nonfinite_steps``."""
        self._names = list(names)
        self._limit = limit
        self._last = ""  # why the last one was
        self.in_a_row = 0

    @property
    def too_many(self) -> bool:
        """Whether ``check`` raises."""
        return self.in_a_row >= self._limit

    def take(self, report: GradientReport, update: int, rows: Sequence[str] | None = None) -> None:
        """Take note of update ``update``.

        ``rows``: names of the update's gradients, if they are not the objectives' alone.
        """
        rows = rows or self._names
        if report.excluded:
            names = ", ".join(rows[i] for i in report.excluded)
            logger.warning(
                "update %d: the gradient of %s is zero, left out of the combination", update, names
            )
        at_fault = ", ".join(rows[i] for i in report.nonfinite) or "the combination"
        reason = report.reason or f"the gradient of {at_fault} is not finite"
        last = report.reason or f"the gradient of {at_fault} was not finite"
        self.count(report.skipped, update, reason, last)

    def count(self, skipped: bool, update: int, reason: str, last: str) -> None:
        """Take note of whether update ``update`` was skipped.

        ``reason``: why it was, if it was; ``last``: the same, of an update that is over.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self._last = last
        logger.warning("update %d skipped: %s", update, reason)

    def check(self) -> None:
        """Raise ``RuntimeError`` at the limit."""
        if self.too_many:
            raise RuntimeError(
                f"stopped: {self._last} in {self._limit} updates in a row (gradients.max_nonfinite_steps)"
            )
