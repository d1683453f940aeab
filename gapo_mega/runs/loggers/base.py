"""What a logger is, and what a run tells it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gapo_mega.optional import Probe

Cell = str | float | int | None


@dataclass(frozen=True)
class About:
    """What is known of a run before its first step.

    Attributes:
        directory: of the run, which exists.
        config: every setting, as JSON has it; empty where nobody has recorded it.
        config_text: the same as the YAML file of the run.
        step: optimizer steps that earlier processes have done and keep; 0: the run begins.
        remembered: what ``remember`` was told by an earlier process of this run; None at its beginning.
        remember: keeps a text, such as the service's id of the run, for the process that resumes it.
    """

    directory: Path
    config: Mapping[str, Any]
    config_text: str
    step: int
    remembered: str | None
    remember: Callable[[str], None]

    @property
    def name(self) -> str:
        """Of the run, for people."""
        return self.directory.resolve().name


@dataclass(frozen=True)
class Table:
    """Rows for people, each as long as ``columns``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def as_markdown(self) -> str:
        """One table of GitHub's Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(_in_markdown(cell) for cell in line)} |" for line in lines)


@dataclass(frozen=True)
class Outcome:
    """What a run has come to: what its report shows beside the numbers of single steps.

    Attributes:
        step: its last optimizer step.
        numbers: of ``summary.json``, under ``summary/KEY/...``.
        tables: ``heldout``: scores before and after training; ``answers``: responses before and after.
        pictures: the report's PNG files, by what they show.
        page: the report, a page that needs nothing else.
    """

    step: int
    numbers: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    page: Path | None = None


class Logger(ABC):
    """One place that shows runs. Options are the constructor's keyword arguments.

    The main rank calls ``start``, ``log`` for every step, ``conclude`` if the run comes to its end, and
    ``close``. An error in ``start`` ends the run before its first step. After an error in what follows, the
    run warns, goes on, and does not call the logger again.
    """

    name: ClassVar[str]  # what ``logging.loggers[].name`` in the configuration calls it

    @classmethod
    def probe(cls) -> Probe | None:
        """The package that it needs; None: nothing that could be missing. Called before any work."""
        return None

    @abstractmethod
    def start(self, about: About) -> None:
        """Begin, or go on with what an earlier process began: then ``about.step`` is above 0."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of an optimizer step, some of which may be NaN.

        Steps count from 1, and grow. A run that is resumed repeats steps after the last checkpoint.
        """

    def conclude(self, outcome: Outcome) -> None:
        """Take what the run has come to; by default nothing."""
        return None

    @abstractmethod
    def close(self, failed: bool) -> None:
        """End; ``failed``: the run ends with an error. Called once, after ``start``."""


def require_text(option: str, value: object, *, none: bool = False) -> None:
    """Raise ``ValueError`` unless an option is a text that is not empty, or with ``none`` None."""
    if (value is None and none) or (isinstance(value, str) and value.strip()):
        return
    raise ValueError(f"{option}: found {value!r}, accepted: a text{', or null' if none else ''}")


def _in_markdown(cell: Cell) -> str:
    text = f"{cell:.6g}" if isinstance(cell, float) else "" if cell is None else str(cell)
    return "<br>".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())
