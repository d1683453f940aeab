"""Which objective ``serve-reward`` serves, and what it refuses before it serves."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn

from gapo_mega import objectives, optional
from gapo_mega.commands import reward_server
from gapo_mega.commands.serve_reward import serve_reward
from gapo_mega.config import ObjectiveConfig
from gapo_mega.types import Prompt
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


def test_it_listens_on_the_loopback_unless_told_otherwise() -> None:
    assert inspect.signature(serve_reward).parameters["host"].default == "127.0.0.1"


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


REWARDS = """
def length(prompts, responses):
    for response in responses:
        if response == "refuse":
            raise ValueError("found\\nsomething with \\udc80 in it")
        if response == "short":
            return []
        if response == "nan":
            return [float("nan")] * len(responses)
    return [float(len(response)) for response in responses]
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the application with a Python function, served by uvicorn in a thread."""
    path = tmp_path_factory.mktemp("served") / "rewards.py"
    path.write_text(REWARDS)
    with serving(ObjectiveConfig(name="a", function=f"{path}:length")) as url:
        yield url


@contextmanager
def serving(config: ObjectiveConfig) -> Iterator[str]:
    """Address of the application with this objective, served by uvicorn in a thread."""
    app = reward_server.create_app(objectives.build(config))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with reward_server._listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/score"
        server.should_exit = True
        thread.join()


def refused(url: str, body: bytes, content_type: str = "application/json") -> tuple[int, str]:
    """Status, and the one line that says what is wrong."""
    answer = requests.post(url, data=body, headers={"Content-Type": content_type}, timeout=60)
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and "\n" not in detail and len(detail) < 400
    return answer.status_code, detail


def samples(**wrong: str) -> bytes:
    """A request of two samples as JSON; ``wrong`` holds JSON for keys of the second one."""
    values = {"prompt": '"a"', "response": '"b"', **wrong}
    second = ", ".join(f'"{key}": {value}' for key, value in values.items())
    return f'{{"samples": [{{"prompt": "a", "response": "b"}}, {{{second}}}]}}'.encode("latin-1")


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        (
            samples(response=r'"x\ud800y"'),
            422,
            r"samples.1.response: found 'x\ud800y', accepted: text without lone surrogates (there is one",
        ),
        (samples(prompt=r'"\udfff"'), 422, r"samples.1.prompt: found '\udfff', accepted: text"),
        (
            samples(
                messages=r'[{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]'
            ),
            422,
            r"samples.1.messages.0.content: found '\ud83d'",
        ),
        (samples(messages=r'[{"role": "\udc00", "content": "b"}]'), 422, r"samples.1.messages.0.role: found"),
        (samples(**{r"\udc00": "1"}), 422, r"samples.1: found '\udc00'"),
        (samples(columns=r'{"a": [{"b": "\ud83d"}]}'), 422, "samples.1.columns: found {'a': [{"),
        (samples(columns="[1]"), 422, "samples.1.columns: found [1]"),
        (samples(response="NaN"), 422, "samples.1.response: found nan, accepted: a valid string"),
        (samples(response="true"), 422, "samples.1.response: found True, accepted: a valid string"),
        (samples(response="1e999"), 422, "samples.1.response: found inf"),
        (samples(response="null"), 422, "samples.1.response: found None"),
        (samples(prompt="[1]"), 422, "samples.1.prompt: found [1]"),
        (samples(messages="[]"), 422, "samples.1: found {"),
        (samples(reply="1"), 422, "samples.1.reply: found 1, accepted: Extra inputs are not permitted"),
        (b'{"samples": NaN}', 422, "samples: found nan, accepted: a valid list"),
        (b'{"samples": []}', 422, "samples: found [], accepted: "),
        (b'{"samples": {"prompt": "a"}}', 422, "samples: found {"),
        (b'{"samples": [1, 2, 3]}', 422, "samples.0: found 1, accepted: a valid dictionary"),
        (b"[]", 422, "body: found []"),
        (b"NaN", 422, "body: found nan"),
        (b"", 422, "body: found None, accepted: "),
        (
            b"{",
            422,
            "body: found Expecting property name enclosed in double quotes at character 1, accepted: JS",
        ),
        (samples(response='"\xe9"'), 400, "parsing the body"),  # Latin-1, no UTF-8
        (b"[" * 100_000, 400, "parsing the body"),
        (b'{"samples": ' + b"1" * 5000 + b"}", 400, "parsing the body"),
    ],
)
def test_malformed_requests_are_told_key_and_row(served: str, body: bytes, status: int, line: str) -> None:
    found, detail = refused(served, body)
    assert found == status
    assert line in detail


def test_another_content_type_is_told(served: str) -> None:
    status, detail = refused(served, samples(), "text/plain")
    assert status == 422
    assert detail.startswith("body: found b'{") and "Content-Type: application/json" in detail


def test_the_number_of_further_faults_is_told(served: str) -> None:
    assert refused(served, b'{"samples": [1, 2, 3]}')[1].endswith("(and 2 more)")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_not_read_to_its_end(
    served: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = reward_server.create_app(objectives.build(ObjectiveConfig(name="a", function="builtins:max")))
    (limit,) = (m for m in app.user_middleware if m.cls is reward_server.BodyLimit)
    assert limit.kwargs == {"most": reward_server.LARGEST_BODY} and reward_server.LARGEST_BODY >= 1 << 20
    body = samples(response=json.dumps("x" * reward_server.LARGEST_BODY))
    pieces: Any = (body[i : i + (1 << 20)] for i in range(0, len(body), 1 << 20)) if chunked else body
    try:
        answer = requests.post(served, data=pieces, headers={"Content-Type": "application/json"}, timeout=60)
    except requests.ConnectionError:  # the service has answered and closed while the client was still writing
        pass
    else:
        assert answer.status_code == 413 and answer.json()["detail"].startswith("body: found more than ")
    root = served.removesuffix("/score")
    assert requests.get(f"{root}/health", timeout=10).json()["status"] == "ok"


def test_a_large_body_within_the_limit_is_scored(served: str) -> None:
    text = "x" * (8 << 20)
    answer = requests.post(served, data=samples(response=json.dumps(text)), timeout=60, headers=JSON)
    assert answer.json() == {"scores": [1.0, float(len(text))]}


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\ufffd", "\U0001f600", "\u2028", "\ufeff"])
def test_every_text_that_has_utf_8_is_scored(served: str, text: str) -> None:
    """A policy can sample any of these, so a service that refused one would end the training."""
    for body in (samples(response=json.dumps(text)), json.dumps(content(text), ensure_ascii=False).encode()):
        answer = requests.post(served, data=body, headers=JSON, timeout=10)
        assert answer.json()["scores"][-1] == float(len(text))


def content(text: str) -> dict[str, Any]:
    return {"samples": [{"prompt": text, "response": text}]}


@pytest.mark.parametrize(
    ("response", "line"),
    [
        ("refuse", "found something with \ufffd in it"),
        ("short", "objective 'a': found 0 scores, accepted: 2, one for each response"),
        ("nan", "objective 'a': found the score nan for response 0, accepted: a finite number"),
    ],
)
def test_what_the_objective_refuses_is_one_line(served: str, response: str, line: str) -> None:
    assert refused(served, samples(response=json.dumps(response))) == (422, line)


COLUMNS = """
def right(responses, columns):
    return [float(r == row["answer"]["text"]) for r, row in zip(responses, columns)]

def ended(responses, finished):
    return [float(f) for f in finished]
"""


def test_columns_go_from_a_run_to_a_served_function(tmp_path: Path) -> None:
    path = tmp_path / "column_rewards.py"
    path.write_text(COLUMNS)
    prompts = [Prompt(i, "?", columns={"answer": {"text": f"a{i}"}, "secret": 1}) for i in range(3)]
    config = ObjectiveConfig(name="a", function=f"{path}:right", columns=["answer"])
    with serving(config) as url:
        asked = {"name": "b", "kind": "http", "options": {"url": url, "retries": 0}}
        run = objectives.build(ObjectiveConfig.model_validate(asked | {"columns": ["answer"]}))
        assert run.score(prompts, ["a0", "a0", "a2"]) == [1.0, 0.0, 1.0]
        without = objectives.build(ObjectiveConfig.model_validate(asked))
        with pytest.raises(
            ValueError,
            match=r"status 422 .*columns: found none with the prompt of response 0, accepted: answer",
        ):
            without.score(prompts, ["a0", "a0", "a2"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"function": "ended"},
            "found .*:ended, which asks for token_counts or finished; accepted: a function of",
        ),
        (
            {"function": "right", "columns": ["answer"], "outputs": ["a", "b"]},
            r"found outputs \['a', 'b'\], accep",
        ),
    ],
)
def test_what_a_service_cannot_give_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = tmp_path / "served_rewards.py"
    path.write_text(COLUMNS)
    named = {} if "outputs" in fields else {"name": "a"}
    config = ObjectiveConfig.model_validate({**named, **fields, "function": f"{path}:{fields['function']}"})
    with pytest.raises(ValueError, match=f"^serve-reward: {message}"):
        reward_server.serve(config, "127.0.0.1", 0)
