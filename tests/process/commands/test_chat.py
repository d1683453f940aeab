"""The command with somebody at a terminal, and in a pipeline of a shell."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.environment import environment
from tests.helpers.perturbed import perturbed
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

CHAT = [sys.executable, "-m", "gapo_mega.cli", "chat"]
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PATIENCE = 240.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has room for an answer of minutes."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_llama(folder / "model", vocab=101, max_position_embeddings=60000)
    byte_tokenizer(folder / "model", CHAT_TEMPLATE)
    perturbed(folder / "model", folder / "tuned", seed=1)
    return folder / "model"


class Terminal:
    """The other side of a process's terminal."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self._descriptor = descriptor
        self.process = process
        self._read = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def until(self, pattern: str, pressing: str = "") -> str:
        """What the terminal shows up to the next ``pattern``, which is taken off.

        ``pressing`` is typed in each second that shows nothing: Python's ``input`` loses an interrupt between
        its prompt and its wait.
        """
        end = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self._read)) is None:
            assert time.monotonic() < end, self._read
            ready = select.select([self._descriptor], [], [], 1.0)[0]
            if not ready:
                self.type(pressing)
            else:
                new = os.read(self._descriptor, 65536).decode()
                self._read += COLOURS.sub("", new)
        shown, self._read = self._read[: found.end()], self._read[found.end() :]
        return shown


@contextmanager
def at_a_terminal(*arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*CHAT, *arguments],
        env={**environment(), "TERM": "xterm", "COLUMNS": "100"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C reaches it
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_somebody_at_a_terminal(model: Path) -> None:
    settings = ("--temperature", "0", "--max-new-tokens", "50000")
    with at_a_terminal("--model", str(model), *settings) as terminal:
        terminal.until(r"model; /help lists the commands\r\n> ")
        terminal.type("/hlep\n")
        terminal.until(r"found /hlep, accepted: /help, .*\r\n> ")
        terminal.type("/system Be kind.\n")
        terminal.until(r"system message: Be kind\.\r\n> ")
        terminal.type("Hi there\n")
        terminal.until(r"Hi there\r\n")
        terminal.until(r"\S+ \S+ \S+ ")  # words, before the answer is complete
        terminal.type("\x03")
        terminal.until(r"stopped\r\n> ")
        terminal.type("half a line\x03")
        terminal.until(r"/quit or Ctrl-D ends\r\n> ", pressing="\x03")
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE) == 0


def test_two_models_side_by_side_and_a_pipe(model: Path) -> None:
    both = ("--model", str(model), "--model", f"other={model.parent / 'tuned'}")
    settings = ("--temperature", "0", "--max-new-tokens", "4")
    with at_a_terminal(*both, *settings) as terminal:
        terminal.until(r"model, other; /help")
        terminal.type("Hi\n")
        shown = terminal.until(r"cut at 4 tokens\s+cut at 4 tokens")
        terminal.type("/quit\n")
        assert terminal.process.wait(PATIENCE) == 0
    piped = subprocess.run(
        [*CHAT, *both, *settings],
        env=environment(),
        input="Hi\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert piped.returncode == 0, piped.stderr
    answers = dict(line.split(": ", 1) for line in piped.stdout.splitlines())
    assert list(answers) == ["model", "other"] and answers["model"] != answers["other"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()]
    assert list(answers) in rows
    assert [answers["model"].strip(), answers["other"].strip()] in rows
