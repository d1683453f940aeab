"""Commands of this package beside a test, without the seconds that an interpreter takes to load.

A process beside the tests loads once what commands import, and every command is a fork of it; ``forking``
says what is the same. The fork becomes this process's child, so that it is waited for as any other. Tests
of how commands are started give them to an interpreter instead.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers import forking
from tests.helpers.environment import ROOT, environment

_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


class Command:
    """``gapo-mega ARGUMENTS``, with ``subprocess.Popen``'s words for what can be done to it."""

    def __init__(
        self, *arguments: object, cwd: Path | None = None, apart: bool = False, **variables: str
    ) -> None:
        """``variables``: more than this process has; ``apart``: standard error is kept beside the output."""
        words = list(map(str, arguments))
        folder = Path(tempfile.mkdtemp(dir=_outputs()))
        self._output, self._errors = folder / "output", folder / ("errors" if apart else "output")
        for path in (self._output, self._errors):
            path.touch()
        ranks = int(words[words.index("--nproc") + 1]) if "--nproc" in words else 0
        order = forking.Order(
            words,
            {**environment(), **variables},
            str(Path.cwd() if cwd is None else cwd),
            str(self._output),
            str(self._errors),
            ranks,
        )
        self.pid, self._reap = _forked(order) if sys.platform == "linux" else _interpreted(order)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._reap()
        return self.returncode

    def communicate(self, timeout: float = 600.0) -> tuple[str, str]:
        """Standard output and standard error once it has ended; ``TimeoutExpired`` after so many seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("gapo-mega", timeout, self._output.read_bytes())
            time.sleep(0.01)
        output = self._output.read_text()
        return output, "" if self._errors == self._output else self._errors.read_text()

    def send_signal(self, number: signal.Signals) -> None:
        """To the process, if it is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(
    *arguments: object, cwd: Path | None = None, timeout: float = 600.0
) -> subprocess.CompletedProcess[str]:
    """The command, when it has ended; ``TimeoutExpired`` after so many seconds."""
    command = Command(*arguments, cwd=cwd, apart=True)
    output, errors = command.communicate(timeout)
    assert command.returncode is not None
    words = ["gapo-mega", *map(str, arguments)]
    return subprocess.CompletedProcess(words, command.returncode, output, errors)


Started = tuple[int, Callable[[], "int | None"]]


def _interpreted(order: forking.Order) -> Started:
    with open(order.output, "ab") as output, open(order.errors, "ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "gapo_mega.cli", *order.arguments],
            cwd=order.folder,
            env=order.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
    return process.pid, process.poll


def _forked(order: forking.Order) -> Started:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with _adopting():
        server.stdin.write(json.dumps(dataclasses.asdict(order)) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
    assert answer, "the process that commands are forks of has ended"
    process = int(answer)
    return process, lambda: forking.reap(process)


@contextmanager
def _adopting() -> Iterator[None]:
    """What loses its parent among the children of this process's children becomes this process's child."""
    _adopt(True)
    try:
        yield
    finally:
        _adopt(False)


def _adopt(orphans: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


@functools.cache
def _outputs() -> str:
    """A directory for what commands print, which goes with this process."""
    folder = tempfile.mkdtemp(prefix="commands-")
    atexit.register(shutil.rmtree, folder)
    return folder


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.commands"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the test run, which then closes its input
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """Start what standard input orders, a line each, and answer with the numbers of the processes."""
    forking.load()
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        order = forking.Order(**json.loads(line))
        read, write = os.pipe()
        # The process between ends at once, and leaves the command without a parent.
        between = forking.in_fork(functools.partial(_start, order, write, answers))
        os.close(write)
        assert forking.wait(between, 60.0) == 0
        os.write(answers, os.read(read, 32) + b"\n")
        os.close(read)


def _start(order: forking.Order, told: int, answers: int) -> None:
    os.close(answers)
    process = forking.start(order, lambda: os.close(told))
    os.write(told, str(process).encode())


if __name__ == "__main__":
    _serve()
