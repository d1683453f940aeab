"""Credentials of kind http, over real sockets: those configured are sent, no others, and none is shown."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.credentials import credential_in_query
from tests.helpers.http_services import EXPECTED, PROMPTS, RESPONSES, objective, right, services

TOKEN = "Bearer configured-8f3a"


@pytest.fixture
def service() -> Iterator[Any]:
    with services() as start:
        yield start


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with credentials of its own for this machine, and no proxy of the machine's."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ambient password from-netrc\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path


def score(url: str, **options: Any) -> list[float]:
    return objective(url, **options).score(PROMPTS[:2], RESPONSES[:2])


def test_netrc_does_not_replace_the_configured_credential(service: Any) -> None:
    state = service(lambda number, content: right(content))
    assert score(state.url, headers={"Authorization": "env:REWARD_TOKEN"}) == EXPECTED[:2]
    assert [sent["Authorization"] for sent in state.headers] == [TOKEN]


def test_netrc_adds_no_credential_where_none_is_configured(service: Any) -> None:
    state = service(lambda number, content: right(content))
    assert score(state.url, headers={"X-Team": "red"}) == EXPECTED[:2]
    (sent,) = state.headers
    assert sent["X-Team"] == "red"
    assert not {"authorization", "proxy-authorization", "cookie"} & {name.lower() for name in sent}


def test_other_credentials_of_the_environment_are_not_sent(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "HTTP_AUTHORIZATION", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "ambient-secret")
    state = service(lambda number, content: right(content))
    score(state.url)
    assert "ambient-secret" not in str(state.headers) + str(state.requests)


@pytest.mark.parametrize("how", ["env", "file"])
def test_a_configured_proxy_routes_and_gets_its_own_credential_only(
    service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    proxy = service(lambda number, content: right(content))
    address = proxy.url.removeprefix("http://").removesuffix("/score")
    monkeypatch.setenv("REWARD_PROXY", f"http://someone:pass@{address}")
    (tmp_path / "proxy").write_text(f"http://someone:pass@{address}\n")
    (tmp_path / "proxy").chmod(0o600)
    options = {"proxy": {"env": "env:REWARD_PROXY", "file": f"file:{tmp_path}/proxy"}[how]}
    headers = {"Authorization": "env:REWARD_TOKEN"}
    assert score("http://rewards.invalid/score", headers=headers, **options) == EXPECTED[:2]
    assert proxy.paths == ["http://rewards.invalid/score"]
    (sent,) = proxy.headers
    assert sent["Authorization"] == TOKEN
    assert sent["Proxy-Authorization"] == "Basic " + base64.b64encode(b"someone:pass").decode()
    score("http://rewards.invalid/score", **options)
    assert "Authorization" not in proxy.headers[1]
    score("http://rewards.invalid/score", proxy=f"http://{address}")
    assert "Proxy-Authorization" not in proxy.headers[2]


def test_proxies_and_certificates_of_the_environment_do_not_count(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = service(lambda number, content: (200, b'{"scores": [9, 9]}', {}))
    state = service(lambda number, content: right(content))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, other.url.removesuffix("/score"))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, "/nowhere.pem")
    assert score(state.url) == EXPECTED[:2]
    assert other.requests == []


def test_an_error_of_a_proxy_does_not_show_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_PROXY", "http://someone:hidden-pass@127.0.0.1:1")
    with pytest.raises(ValueError, match=r"after 1 attempt") as raised:
        score("http://rewards.invalid/score", retries=0, proxy="env:REWARD_PROXY")
    assert "hidden-pass" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proxy": "http://me:visible@host:1"}, r"proxy: found a password in it, accepted: none"),
        ({"proxy": "socks5://host:1"}, r"proxy: found what is no address of a proxy, accepted: http://HOST"),
        ({"proxy": "host:1"}, r"proxy: found what is no address of a proxy"),
        ({"proxy": "http://host:99999"}, r"proxy: found what is no address of a proxy"),
        (
            {"proxy": "env:NOT_SET"},
            r"proxy: found 'env:NOT_SET', but the environment variable 'NOT_SET' is not",
        ),
        (
            {"certificates": "/nowhere.pem"},
            r"certificates: file /nowhere.pem not found, accepted: a PEM file",
        ),
    ],
)
def test_a_route_that_is_none_is_refused_when_the_run_starts(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^objective 'helpful': options: {message}") as raised:
        objective("http://localhost", **options)
    assert "visible" not in str(raised.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_credentials_do_not_follow_a_redirect(service: Any, status: int) -> None:
    other = service(lambda number, content: right(content))
    state = service(lambda number, content: (status, b"", {"Location": other.url}))
    with pytest.raises(ValueError, match=f"after 1 attempt, status {status}"):
        score(state.url, headers={"Authorization": "env:REWARD_TOKEN"})
    assert other.requests == []


@pytest.mark.parametrize("status", [200, 401, 503])
@pytest.mark.parametrize(
    "filler", [0, 183]
)  # then the 200 characters that are shown end within the credential
def test_what_a_service_repeats_of_a_credential_is_hidden(service: Any, status: int, filler: int) -> None:
    body = b"." * filler + b"Bearer configured-8f3a: configured-8f3a is wrong"
    state = service(lambda number, content: (status, body, {}))
    with pytest.raises(ValueError, match="found, after") as raised:
        score(state.url, headers={"Authorization": "env:REWARD_TOKEN"}, retries=1)
    assert "configured" not in str(raised.value) and "8f3a" not in str(raised.value)
    assert "***" in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "authorization",
        "X-Api-Key",
        "api_key",
        "X-Auth-Token",
        "Cookie",
        "Client-Secret",
        "X-Signature",
        "X-Team",
    ],
)
def test_a_credential_that_is_written_out_is_refused(name: str) -> None:
    """The configuration is written to the run's folder and to its report."""
    with pytest.raises(
        ValueError, match=rf"options: headers\.{name}: found a value that is written out"
    ) as raised:
        objective("http://localhost", headers={name: "Bearer visible"})
    assert "visible" not in str(raised.value) and "'env:NAME'" in str(raised.value)
    assert "'file:PATH'" in str(raised.value)


@pytest.mark.parametrize(
    "value",
    [
        "Token visible",
        "sk-visible12345",
        "hf_visible12345",
        "ghp_visible12345",
        "github_pat_visible",
        "xoxb-visible",
        "AKIAVISIBLE123456",
        "AIzaVisible1234567890",
        "eyJhbGciOiJ9.eyJzdWIi.visible",
        "  Bearer visible",
    ],
)
def test_a_value_that_looks_like_a_key_is_refused_under_any_name(value: str) -> None:
    with pytest.raises(ValueError, match=r"headers\.X-Team: found a value that is written out") as raised:
        objective("http://localhost", headers={"X-Team": value})
    assert value.strip() not in str(raised.value)


def test_a_credential_may_stand_in_a_file(
    service: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    state = service(lambda number, content: right(content) if number == 0 else (401, TOKEN.encode(), {}))
    assert score(state.url, headers={"Authorization": f"file:{path}"}) == EXPECTED[:2]
    assert state.headers[0]["Authorization"] == TOKEN and caplog.text == ""
    path.chmod(0o640)
    with pytest.raises(ValueError, match="status 401") as raised:
        score(state.url, headers={"Authorization": f"file:{path}"})
    assert "configured" not in str(raised.value)
    assert f"{path} holds a credential, and others may read it (chmod 600 {path})" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\xff secret", r"cannot be read \(it is no text\)"),
        (b"secret" * 20_000, "is too long for a credential"),
        (b"secret\nsecret", "a name or value that HTTP does not allow"),
    ],
)
def test_a_file_without_a_credential_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"headers\.X-Api-Key: found .*{reason}.*; accepted|{reason}"
    ) as raised:
        objective("http://localhost", headers={"X-Api-Key": f"file:{path}"})
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/stdin", "/"])
def test_a_file_that_never_ends_is_not_read(place: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        objective("http://localhost", headers={"X-Api-Key": f"file:{place}"})


@pytest.mark.parametrize("name", ["X-Team", "X-Author", "X-Monkey", "Accept", "X-Request-Id", "X-Max-Tokens"])
def test_other_headers_may_be_written_out(service: Any, name: str) -> None:
    state = service(lambda number, content: right(content))
    score(state.url, headers={name: "value"})
    assert state.headers[0][name] == "value"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            None,
            r"headers\.Authorization: found 'env:REWARD_TOKEN', but .* 'REWARD_TOKEN' is not set; accepted",
        ),
        ("", r"headers\.Authorization: found 'env:REWARD_TOKEN', but .* 'REWARD_TOKEN' is empty; accepted"),
        ("secret\n", r"headers\.Authorization: found a name or value that HTTP does not allow"),
        ("se\u20accret", r"headers\.Authorization: found a name or value .*in Latin-1"),
    ],
)
def test_a_variable_that_cannot_be_sent_is_refused_when_the_run_starts(
    value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("REWARD_TOKEN")
    else:
        monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(ValueError, match=message) as raised:
        objective("http://localhost", headers={"Authorization": "env:REWARD_TOKEN"})
    assert "cret" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"X-A": "1", "x-a": "2"}, r"headers\.x-a: found in two spellings"),
        ({"Content-Length": "3"}, r"headers\.Content-Length: found, accepted: none"),
        ({"X A": "1"}, r"headers\.X A: found a name or value"),
        ({"X-\u00e9": "1"}, r"found a name or value"),
    ],
)
def test_headers_that_would_not_be_sent_as_they_are(headers: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective("http://localhost", headers=headers)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/score?api_key=visible", r"url: found the parameter 'api_key', accepted: none that is"),
        ("http://host/score?a=1&access_token=visible", r"url: found the parameter 'access_token'"),
        ("http://host/score?sv=1&sig=visible", r"url: found the parameter 'sig'"),
        ("ftp://me:visible@host/x", r"url: found 'ftp://\*\*\*@host/x', accepted: http"),
    ],
)
def test_a_credential_in_the_address_is_refused_and_not_shown(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        objective(url)
    assert "visible" not in str(raised.value)


def test_other_parameters_of_an_address_are_allowed(service: Any) -> None:
    state = service(lambda number, content: right(content))
    assert score(f"{state.url}?model=small") == EXPECTED[:2]
    assert state.paths == ["/score?model=small"]
    assert credential_in_query("http://h/x?monkey=1&author=2&max_tokens=3&design=4") is None
