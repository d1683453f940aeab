"""Options that name a variable or a file get its content where they are used, and nobody is shown it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gapo_mega import cli
from gapo_mega.aggregation import build as build_aggregator
from gapo_mega.config import ObjectiveConfig
from gapo_mega.credentials import hidden, revealed
from gapo_mega.objectives import build
from gapo_mega.types import Prompt

CODE = """
from gapo_mega.aggregation.base import Aggregator
from gapo_mega.objectives.base import ObjectiveKind


def reward(prompts, responses, *, token, places):
    if responses == ["fail"]:
        raise ValueError(f"{'.' * 180} refused {token}")
    return [float(len(token)) + len(places[0]["url"]) for _ in responses]


class Own(ObjectiveKind):
    kind = "own"

    def evaluate(self, prompts, responses):
        return [float(len(self.revealed_options()["token"])) for _ in responses]


class Refuses(Aggregator):
    def __init__(self, api_key):
        raise ValueError(f"found {api_key!r}, accepted: none")

    def solution(self, gram):
        return gram.diagonal()
"""
TOKEN, ADDRESS = "visible-8f3a2c", "https://me:visible-pw@host/x"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    monkeypatch.setenv("MY_ADDRESS", ADDRESS)
    path = tmp_path / "named_secrets.py"
    path.write_text(CODE)
    return str(path)


def test_names_become_values_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    file = tmp_path / "token"
    file.write_text("of-a-file\n")
    file.chmod(0o600)
    options: dict[str, Any] = {
        "uri": "env:MY_TOKEN",
        "auth": [{"token": "env:MY_TOKEN"}, {"api_keys": [f"file:{file}", "env:MY_TOKEN"]}],
        # What only looks like a name stays: an address, and a text.
        "place": "file:///tmp/mlruns",
        "other": f"file:{file}",
        "text": "env: what is around",
        "count": 3,
    }
    assert revealed("here", options) == {
        **options,
        "uri": TOKEN,
        "auth": [{"token": TOKEN}, {"api_keys": ["of-a-file", TOKEN]}],
    }
    assert options["uri"] == "env:MY_TOKEN"
    assert hidden("x of-a-file y") == "x *** y"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": {"uri": "env:NOT_SET"}}, r"here\.a\.uri: found 'env:NOT_SET', but the environment variable"),
        ({"token": "file:/nowhere"}, r"here\.token: found 'file:/nowhere', but the file cannot be read"),
    ],
)
def test_what_is_not_there_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        revealed("here", options)


def test_a_short_value_without_a_secret_s_name_hides_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PROJECT", "demo9x")
    monkeypatch.setenv("MY_ADDRESS", ADDRESS)
    revealed("here", {"project": "env:MY_PROJECT", "uri": "env:MY_ADDRESS"})
    assert (
        hidden("runs/demo9x: visible-pw at postgres://me:other@host")
        == "runs/demo9x: *** at postgres://***@host"
    )


def test_a_reward_gets_the_value_and_its_error_does_not_show_it(code: str) -> None:
    options = {"token": "env:MY_TOKEN", "places": [{"url": "env:MY_ADDRESS"}]}
    config = ObjectiveConfig(name="mine", function=f"{code}:reward", options=options)
    objective = build(config)
    assert objective.score([Prompt(0, "a")], ["b"]) == [float(len(TOKEN) + len(ADDRESS))]
    assert config.options == options
    with pytest.raises(ValueError, match=r"refused \*\*\*") as raised:
        objective.score([Prompt(0, "a")], ["fail"])
    assert "visible" not in str(raised.value)


def test_a_kind_of_one_s_own_asks_for_the_values(code: str) -> None:
    objective = build(ObjectiveConfig(name="mine", kind=f"{code}:Own", options={"token": "env:MY_TOKEN"}))
    assert objective.score([Prompt(0, "a")], ["b"]) == [float(len(TOKEN))]


def test_a_method_gets_the_value_and_its_error_does_not_show_it(code: str) -> None:
    with pytest.raises(ValueError, match=r"found '\*\*\*', accepted: none"):
        build_aggregator(f"{code}:Refuses", api_key="env:MY_TOKEN")
    with pytest.raises(ValueError, match=r"aggregation\.options\.api_key: found 'env:NO_SUCH', but"):
        build_aggregator(f"{code}:Refuses", api_key="env:NO_SUCH")


def test_the_command_hides_it_in_every_error(
    code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    revealed("here", {"token": "env:MY_TOKEN"})
    monkeypatch.setattr(sys, "argv", ["gapo-mega", "plan", "--config", f"/nowhere/{TOKEN}"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "/nowhere/***" in (error := capsys.readouterr().err) and TOKEN not in error
