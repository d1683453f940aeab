"""The exported model somewhere else: whole or not there, of this run, and nothing told that is secret."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tenacity import nap

from gapo_mega.runs import uploads
from gapo_mega.runs.uploads import UPLOADED, Export, names_in

WEIGHTS = {"model-00001-of-00002.safetensors": "a" * 5000, "model-00002-of-00002.safetensors": "b"}
MODEL = {
    **WEIGHTS,
    "config.json": "{}",
    "model.safetensors.index.json": "{}",
    "tokenizer.json": "{}",
    "sub/chat_template.jinja": "x",
}


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    """An object store; what was written there, in order, is in ``put``."""
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()
    found.pseudo_dirs[:] = [""]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which nobody waits for here."""
    found: list[float] = []
    monkeypatch.setattr(nap.time, "sleep", found.append)
    return found


def model(directory: Path, files: dict[str, str] = MODEL) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def texts(files: Any, root: str) -> dict[str, str]:
    """Everything below ``root``."""
    return {
        name.removeprefix(root).lstrip("/"): files.cat_file(name).decode()
        for name in sorted(files.find(root))
    }


def places(tmp_path: Path) -> list[tuple[str, str]]:
    there = tmp_path / "share" / "models" / "a"
    return [("memory://bucket/a", "/bucket/a"), (f"file://{there}", str(there))]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_model_arrives_whole(tmp_path: Path, store: MemoryFileSystem, kind: int) -> None:
    url, root = places(tmp_path)[kind]
    export = Export(url, ["mine"])
    export.check(tmp_path / "run")
    files = fsspec.filesystem(url.partition(":")[0])
    assert not files.exists(root)  # the check leaves nothing, and no folder
    export.put(model(tmp_path / "hf"), step=7)
    found = texts(files, root)
    assert json.loads(found.pop(UPLOADED)) == {"run": "mine", "step": 7, "files": names_in(tmp_path / "hf")}
    assert found == MODEL


def test_the_configuration_goes_first_and_comes_last(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader in between finds no model: the old one's files or the new one's."""
    Export("memory://bucket/a", ["mine"]).put(model(tmp_path / "old"), step=3)
    order: list[str] = []
    put, remove = MemoryFileSystem.put_file, MemoryFileSystem.rm_file

    def noted_put(self: MemoryFileSystem, source: str, name: str, **more: Any) -> None:
        order.append("+" + name.removeprefix("/bucket/a/"))
        put(self, source, name, **more)

    def noted_remove(self: MemoryFileSystem, name: str) -> None:
        order.append("-" + name.removeprefix("/bucket/a/"))
        remove(self, name)

    monkeypatch.setattr(MemoryFileSystem, "put_file", noted_put)
    monkeypatch.setattr(MemoryFileSystem, "rm_file", noted_remove)
    new = {"model.safetensors": "c", "config.json": '{"new": 1}', "tokenizer.json": "{}"}
    Export("memory://bucket/a", ["mine"]).put(model(tmp_path / "new", new), step=5)
    assert order[:2] == ["-config.json", f"-{UPLOADED}"] and order[-1] == "+config.json"
    found = texts(store, "/bucket/a")
    assert json.loads(found.pop(UPLOADED))["step"] == 5
    assert found == new  # what the older model had more is gone


def test_several_files_have_their_index_after_them(tmp_path: Path) -> None:
    names = names_in(model(tmp_path / "hf", {**MODEL, ".gapo-mega.made-by.json": "{}"}))
    assert names[-2:] == ["model.safetensors.index.json", "config.json"]
    assert set(names) == set(MODEL)


@pytest.mark.parametrize(
    ("there", "mine"),
    [
        ({"config.json": "{}"}, ["mine"]),
        ({UPLOADED: '{"run": "other"}'}, ["mine"]),
        ({UPLOADED: "no JSON"}, ["mine"]),
        ({UPLOADED: "[]", "config.json": "{}"}, ["mine"]),
        ({UPLOADED: '{"run": null}'}, []),
    ],
)
def test_another_model_stays(
    tmp_path: Path, store: MemoryFileSystem, there: dict[str, str], mine: list[str]
) -> None:
    for name, text in there.items():
        store.pipe_file(f"/bucket/a/{name}", text.encode())
    export = Export("memory://bucket/a", mine)
    said = r"^checkpoint\.export_to: found memory://bucket/a, where there is a model that this run has"
    with pytest.raises(ValueError, match=said):
        export.check(tmp_path / "run")
    with pytest.raises(ValueError, match=said):  # it may have come meanwhile
        export.put(model(tmp_path / "hf"), step=1)
    assert texts(store, "/bucket/a") == there


def test_files_beside_the_model_stay(tmp_path: Path, store: MemoryFileSystem) -> None:
    """Also where a list that somebody has changed names them."""
    for name in ("bucket/secret", "bucket/a/notes.txt"):
        store.pipe_file(f"/{name}", b"kept")
    listed = ["../secret", "/bucket/secret", "a/../../secret", ""]
    store.pipe_file(f"/bucket/a/{UPLOADED}", json.dumps({"run": "mine", "files": listed}).encode())
    Export("memory://bucket/a", ["mine"]).put(model(tmp_path / "hf"), step=1)
    assert store.cat_file("/bucket/secret") == store.cat_file("/bucket/a/notes.txt") == b"kept"


class Flaky:
    """A method that fails so often."""

    def __init__(self, method: Any, times: int, error: Exception) -> None:
        self._method, self._times, self._error = method, times, error
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self._times:
            raise self._error
        return self._method(*args, **kwargs)


def test_what_fails_is_tried_again(
    tmp_path: Path,
    store: MemoryFileSystem,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = "https://user:pass@host/x?X-Amz-Signature=abc"
    flaky = Flaky(store.put_file, 4, OSError(f"503 Slow Down from {url}"))
    monkeypatch.setattr(store, "put_file", flaky)
    Export("memory://bucket/a", ["mine"]).put(model(tmp_path / "hf"), step=1)
    assert texts(store, "/bucket/a").keys() == {*MODEL, UPLOADED}
    assert pauses == [1, 2, 4, 8]
    assert (
        "attempt 1 of 5 failed (OSError: 503 Slow Down from https://***@host/x?***); again in 1 s"
        in caplog.text
    )
    assert "pass" not in caplog.text and "abc" not in caplog.text


def test_what_fails_at_last_is_one_line(
    tmp_path: Path, store: MemoryFileSystem, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(store.put_file, 99, ConnectionResetError("two\nlines https://h/x?token=secret"))
    monkeypatch.setattr(store, "put_file", flaky)
    with pytest.raises(ValueError) as caught:
        Export("memory://bucket/a", ["mine"]).put(model(tmp_path / "hf"), step=1)
    line = str(caught.value)
    assert line.startswith(
        "checkpoint.export_to: the model could not be put to memory://bucket/a (Connection"
    )
    assert f"it is whole in {tmp_path / 'hf'}" in line and "\n" not in line and "secret" not in line
    assert flaky.calls == 5 and not store.exists("/bucket/a/config.json")


def test_what_cannot_be_mended_is_not_tried_again(
    tmp_path: Path, store: MemoryFileSystem, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "put_file", Flaky(store.put_file, 99, PermissionError("AccessDenied")))
    with pytest.raises(ValueError, match="PermissionError: AccessDenied"):
        Export("memory://bucket/a", ["mine"]).put(model(tmp_path / "hf"), step=1)
    assert pauses == []


def test_a_file_that_arrives_short_is_no_success(
    tmp_path: Path, store: MemoryFileSystem, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store.put_file

    def cut(source: str, name: str, **more: Any) -> None:
        put(source, name, **more)
        store.pipe_file(name, store.cat_file(name)[:-1])

    monkeypatch.setattr(store, "put_file", cut)
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors has 4999 bytes there, and 5000"):
        Export("memory://bucket/a", ["mine"]).put(model(tmp_path / "hf"), step=1)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://bucket/a", "found the protocol 'nosuch', accepted: one that fsspec knows"),
        ("http://127.0.0.1:9/a", "found http://127.0.0.1:9/a, "),  # read only, or without aiohttp
        ("file:///proc/nothing/here", "found file:///proc/nothing/here, which cannot be written to"),
    ],
)
def test_places_that_take_nothing_are_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Export(url, []).check(Path("run"))
    line = str(caught.value)
    assert line.startswith("checkpoint.export_to: ") and said in line and "\n" not in line


@pytest.mark.parametrize("inside", ["", "/", "/hf", "/sub/model", "/../link/hf"])
def test_the_runs_own_directory_is_no_other_place(tmp_path: Path, inside: str) -> None:
    """It would be copied onto itself."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(ValueError, match=r"^checkpoint\.export_to: found file://.*, which is in the run's"):
        Export(f"file://{run}{inside}", []).check(run)
    assert list(run.iterdir()) == []
    Export(f"file://{tmp_path / 'run-model'}", []).check(run)


def test_a_package_that_is_not_there_is_named() -> None:
    """No environment of ours has fsspec's driver of Dropbox."""
    with pytest.raises(ValueError, match=r"the package for dropbox is not usable \(ImportError: .*dropbox"):
        Export("dropbox://a/b", []).check(Path("run"))


def test_a_folder_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the system's answer is given here."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to .*Permission denied"):
        Export(f"file://{tmp_path / 'a'}", []).check(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_told_is_one_line_without_addresses_that_are_signed() -> None:
    error = OSError("PUT 'https://storage.example/upload?upload_id=SECRET&x=1' failed:\n\n 500")
    assert uploads._told(error) == "OSError: PUT 'https://storage.example/upload?***' failed: 500"
    assert uploads._told(TimeoutError()) == "TimeoutError()"
