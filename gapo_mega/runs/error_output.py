"""What a process says of its end: in one piece, for ranks share a terminal.

Torchrun starts interpreters that write everything at once (``python -u``). There ``print`` writes a text and
its end of line apart, and a traceback comes piece by piece: those of two ranks get into one another.
"""

from __future__ import annotations

import sys
import traceback
from types import TracebackType

from gapo_mega.credentials import hidden
from gapo_mega.option_checks import as_one_line


def show_error(error: BaseException) -> None:
    """The line of an error in what was asked for, on standard error."""
    show(f"error: {as_one_line(hidden(str(error)))}")


def show(text: str) -> None:
    """``text`` and an end of line on standard error; where that is closed, on standard output."""
    stream = sys.stderr or sys.stdout
    if stream is not None:  # with both closed nobody listens
        stream.write(f"{text}\n")


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For ``sys.excepthook``: the traceback, without the credentials that this process has read."""
    show(hidden("".join(traceback.format_exception(kind, error, trace))).rstrip("\n"))
