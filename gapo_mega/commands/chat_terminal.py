"""A conversation on the screen or over a pipe: lines in, answers out."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import json
import re
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import IO, Protocol

import torch
from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer

from gapo_mega.files import decoded
from gapo_mega.runs.chat import Chat, Reply, Stopped

PROMPT = "> "
HELP = (
    "/reset forgets what was said, /system TEXT sets the system message (/system alone removes it), /quit or "
    "Ctrl-D ends, Ctrl-C ends an answer; //TEXT says a text that begins with /"
)
_COMMANDS = ("/help", "/quit", "/reset", "/system")
# What moves a terminal's cursor, or does worse; line breaks and tabs aside.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Ended(Exception):
    """Somebody asked for the end."""


class Speech(Protocol):
    """What takes commands and messages of a conversation."""

    def reset(self) -> None: ...

    def set_system(self, text: str | None) -> None: ...


def message_of(line: str, chat: Speech) -> tuple[str | None, str]:
    """The message in ``line``, or None after a command; and what to tell whoever wrote it.

    Raises ``Ended`` for the command that ends, ``ValueError`` for one that does not exist.
    """
    text = line.strip()
    if not text.startswith("/"):
        return text or None, ""
    if text.startswith("//"):
        return text[1:], ""
    command, *words = text.split(maxsplit=1)
    rest = "".join(words)
    if command not in _COMMANDS:
        raise ValueError(f"found {command}, accepted: {', '.join(_COMMANDS)}, or //TEXT for a text")
    if rest and command != "/system":
        raise ValueError(f"found {text[:60]!r}, accepted: {command} alone, or //TEXT for a text")
    if command == "/help":
        return None, HELP
    if command == "/quit":
        raise Ended
    if command == "/reset":
        chat.reset()
        return None, "forgotten what was said"
    chat.set_system(rest or None)
    return None, f"system message: {rest}" if rest else "no system message"


def facts_of(reply: Reply) -> str:
    """One line about an answer: its scores, and why it is not whole. Empty where there is nothing to say."""
    parts = [f"{name} {score:.3g}" for name, score in reply.scores.items()]
    if reply.fault is not None:
        parts.append(f"no scores: {reply.fault}")
    if reply.stopped:
        parts.append("stopped")
    elif not reply.finished:
        parts.append(f"cut at {reply.tokens} tokens")
    if reply.left_out:
        parts.append(f"the first {reply.left_out} messages had no room")
    return " · ".join(parts)


def visible(text: str) -> str:
    """``text`` with U+FFFD for control characters, which a model may give and a terminal would obey."""
    return _CONTROL.sub("\ufffd", text)


# -- over a pipe -------------------------------------------------------------------------------------
def over_pipe(chat: Chat, lines: Iterable[bytes], out: IO[str], notes: IO[str], as_json: bool) -> None:
    """Answer every line of ``lines``, which may be commands too; empty ones are passed over.

    An answer is on ``out`` before the next line is read. Raises ``ValueError``, with the line's number, for
    what cannot be answered or scored.
    """
    show = visible if out.isatty() else str
    several = len(chat.models) > 1
    for number, line in enumerate(lines, start=1):
        try:
            message, note = message_of(
                decoded(line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")), chat
            )
            replies = [] if message is None else chat.ask(message, lambda model, token: None)
            for reply in replies:
                if reply.fault is not None:
                    raise ValueError(reply.fault)
        except Ended:
            return
        except ValueError as error:
            raise ValueError(f"line {number} of standard input: {error}") from None
        if note:
            print(note, file=notes)
        for reply in replies:
            if as_json:
                print(_json(message or "", reply), file=out, flush=True)
                continue
            print(show(f"{reply.model}: {reply.text}" if several else reply.text), file=out, flush=True)
            if reply.scores:
                print(f"  {facts_of(reply)}", file=out, flush=True)
            elif facts_of(reply):
                print(f"line {number}: {facts_of(reply)}", file=notes)


def _json(message: str, reply: Reply) -> str:
    row = {
        "model": reply.model,
        "message": message,
        "response": reply.text,
        "tokens": reply.tokens,
        "finished": reply.finished,
    }
    return json.dumps(row | ({"scores": reply.scores} if reply.scores else {}), ensure_ascii=False)


# -- on the screen -----------------------------------------------------------------------------------
class Screen:
    """The conversation with somebody at a terminal."""

    def __init__(self, chat: Chat, console: Console) -> None:
        self._chat = chat
        self._console = console

    def run(self) -> None:
        """Answer until somebody ends it."""
        with contextlib.suppress(ImportError):  # where there is none, lines cannot be edited
            importlib.import_module("readline")
        self._say(f"{', '.join(self._chat.models)}; /help lists the commands")
        while (line := self._line()) is not None:
            try:
                message, note = message_of(line, self._chat)
                if note:
                    self._say(note)
                if message is not None:
                    self._answer(message)
            except Ended:
                return
            except ValueError as error:
                self._say(str(error), style="red")

    def _line(self) -> str | None:
        """The next line; None at the end, empty for one that was given up."""
        try:
            return input(PROMPT)
        except EOFError:
            self._console.print()
            return None
        except KeyboardInterrupt:
            self._console.print()
            self._say("/quit or Ctrl-D ends")
        except UnicodeDecodeError:
            self._say("found bytes that are no UTF-8, accepted: text", style="red")
        return ""

    def _answer(self, message: str) -> None:
        with _interrupts() as asked, self._console.status("reading") as status:
            if len(self._chat.models) > 1:
                replies = self._chat.ask(message, _Counting(status, asked))
            else:
                tokenizer = self._chat.tokenizer_of(self._chat.models[0])
                stream = _Streaming(tokenizer, self._console.file, status, asked)
                replies = self._chat.ask(message, stream)
                stream.end()  # type: ignore[no-untyped-call]
        if len(replies) > 1:
            self._side_by_side(replies)
        elif facts_of(replies[0]):
            self._say(facts_of(replies[0]))

    def _side_by_side(self, replies: list[Reply]) -> None:
        table = Table(box=box.SIMPLE_HEAD, expand=True)
        for reply in replies:
            table.add_column(Text(reply.model), ratio=1, overflow="fold")
        table.add_row(*(Text(visible(reply.text)) for reply in replies))
        facts = [facts_of(reply) for reply in replies]
        if any(facts):
            table.add_row(*(Text(visible(each), style="dim") for each in facts))
        self._console.print(table)

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.print(visible(text), style=style, markup=False, highlight=False)


class _Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.asked = False

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:  # pressed again before a token came
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise ``Stopped``, once, if it was."""
        if self.asked:
            self.asked = False
            raise Stopped


@contextlib.contextmanager
def _interrupts() -> Iterator[_Interrupt]:
    """Inside, Ctrl-C is noted: nothing is left half done, as it might be by an exception anywhere."""
    found = _Interrupt()
    before = signal.signal(signal.SIGINT, found.note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


class _Streaming(TextStreamer):
    """Writes one model's words as they are complete."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, file: IO[str], status: Status, interrupt: _Interrupt
    ) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._file = file
        self._status = status
        self._interrupt = interrupt

    def __call__(self, model: str, token: int) -> None:
        self.put(torch.tensor([token]))  # type: ignore[no-untyped-call]
        self._interrupt.check()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text or stream_end:
            self._status.stop()  # which would write over the words
            self._file.write(visible(text) + "\n" * stream_end)
            self._file.flush()


class _Counting:
    """Says how far the models are."""

    def __init__(self, status: Status, interrupt: _Interrupt) -> None:
        self._status = status
        self._interrupt = interrupt
        self._tokens: dict[str, int] = {}

    def __call__(self, model: str, token: int) -> None:
        self._tokens[model] = self._tokens.get(model, 0) + 1
        self._status.update(", ".join(f"{name}: {count} tokens" for name, count in self._tokens.items()))
        self._interrupt.check()
