"""Lines of a conversation: which are commands, and what is told of an answer."""

from __future__ import annotations

import pytest

from gapo_mega.commands.chat_terminal import HELP, Ended, facts_of, message_of, visible
from gapo_mega.runs.chat import Reply


class Remembers:
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def reset(self) -> None:
        self.calls.append("reset")

    def set_system(self, text: str | None) -> None:
        self.calls.append(text)


@pytest.mark.parametrize(
    ("line", "message", "calls"),
    [
        ("Hi\r\n", "Hi", []),
        ("  two  words \n", "two  words", []),
        (" \t\n", None, []),
        ("//reset\n", "/reset", []),
        ("///etc\n", "//etc", []),
        ("/reset\n", None, ["reset"]),
        ("/system Be brief. /quit\n", None, ["Be brief. /quit"]),
        ("/system\tBe brief.\n", None, ["Be brief."]),
        ("/system\n", None, [None]),
    ],
)
def test_commands_and_messages(line: str, message: str | None, calls: list[object]) -> None:
    chat = Remembers()
    assert message_of(line, chat)[0] == message
    assert chat.calls == calls


def test_help_and_the_end() -> None:
    assert message_of("/help", Remembers()) == (None, HELP)
    with pytest.raises(Ended):
        message_of("/quit\n", Remembers())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", r"^found /rest, accepted: /help, /quit, /reset, /system, or //TEXT for a text$"),
        ("/", r"^found /, accepted: /help"),
        ("/reset all", r"^found '/reset all', accepted: /reset alone, or //TEXT for a text$"),
    ],
)
def test_what_is_no_command_is_no_message_either(line: str, message: str) -> None:
    chat = Remembers()
    with pytest.raises(ValueError, match=message):
        message_of(line, chat)
    assert chat.calls == []


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply("m", "x", 3, True), ""),
        (Reply("m", "x", 3, True, scores={"a": 0.25, "b": -1.0}), "a 0.25 · b -1"),
        (Reply("m", "x", 3, False), "cut at 3 tokens"),
        (Reply("m", "x", 3, False, stopped=True), "stopped"),
        (Reply("m", "x", 3, True, left_out=4), "the first 4 messages had no room"),
        (Reply("m", "x", 3, True, fault="objective 'a': no"), "no scores: objective 'a': no"),
    ],
)
def test_facts_of_an_answer(reply: Reply, expected: str) -> None:
    assert facts_of(reply) == expected


def test_a_terminal_obeys_no_answer() -> None:
    assert visible("a\tb\nc\x1b[2J\x07\x9b\r") == "a\tb\nc\ufffd[2J\ufffd\ufffd\ufffd"
    assert visible("Grüße, 世界 👋") == "Grüße, 世界 👋"
