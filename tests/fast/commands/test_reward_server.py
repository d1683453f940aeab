"""Which objective ``serve-reward`` serves, and what it refuses before it serves."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from gapo_mega import optional
from gapo_mega.commands import reward_server
from gapo_mega.config import ObjectiveConfig
from tests.helpers.http_services import right, services


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None), r"serve-reward: found no objective, accepted: one of --config, --model and"),
        ((None, "m", "a:b"), r"serve-reward: found --model and --function"),
        ((Path("/nowhere.yaml"), None, None), r"config: file /nowhere.yaml not found"),
    ],
)
def test_one_objective_is_served(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_server.objective_config(*given, [])


def test_shortcuts_take_overrides() -> None:
    model = reward_server.objective_config(None, "dir", None, ["options.sign=-1", "clip=3"])
    assert (model.kind, model.options, model.clip) == ("hf_classifier", {"model": "dir", "sign": -1}, 3)
    function = reward_server.objective_config(None, None, "a:b", [])
    assert (function.kind, function.function) == ("python", "a:b")
    with pytest.raises(ValueError, match=r"clip: found -1, .* \(from override 'clip=-1'\)"):
        reward_server.objective_config(None, "dir", None, ["clip=-1"])


@pytest.fixture
def service() -> Iterator[Any]:
    with services() as start:
        yield start


def test_a_port_that_is_taken_is_refused(service: Any) -> None:
    state = service(lambda number, content: right(content))
    port = int(state.url.split(":")[2].removesuffix("/score"))
    with pytest.raises(ValueError, match=rf"--host, --port: found 127.0.0.1 and {port}: .*in use"):
        reward_server.serve(ObjectiveConfig(name="a", function="builtins:max"), "127.0.0.1", port)


def test_without_the_extra_it_is_said_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "version", not_installed)
    optional.serve.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"fastapi and uvicorn not installed; run `pip install 'gapo-mega\[s"
        ):
            reward_server.serve(ObjectiveConfig(name="a", function="builtins:max"), "127.0.0.1", 0)
    finally:
        optional.serve.cache_clear()


def not_installed(name: str) -> str:
    raise PackageNotFoundError(name)
