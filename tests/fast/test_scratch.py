"""Scratch directories: what is held, what a killed process left, and what is nobody's of ours."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.models.huggingface.writing import complete_or_absent, finish_interrupted
from gapo_mega.scratch import MADE_BY, TEMPORARY, _boot, left, remove_left, scratch


def killed(path: Path, size: int = 2_000_000, **facts: Any) -> Path:
    """What a process that was killed left at ``path``: its lock went with it."""
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes(size))
    (path / MADE_BY).write_text(json.dumps({"host": socket.gethostname(), "pid": 1, **facts}))
    return path


def write(target: Path, text: str, overwrite: bool = True) -> None:
    with complete_or_absent(target, overwrite) as partial:
        (partial / "config.json").write_text(text)


def test_what_is_being_written_stays_until_its_block_ends(tmp_path: Path) -> None:
    with scratch(tmp_path, ".hf.partial-") as (path, _):
        assert left(tmp_path, ".hf.partial-") == []
        remove_left(tmp_path, ".hf.partial-")
        assert path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = killed(tmp_path / ".hf.partial-abcdefgh")
    write(tmp_path / "hf", "new")
    assert [found.name for found in tmp_path.iterdir()] == ["hf"]
    assert [found.name for found in (tmp_path / "hf").iterdir()] == ["config.json"]
    assert caplog.messages == [f"removed {path} (2.0 MB), which a killed process had not finished"]


@pytest.mark.parametrize("name", [".hf.partial-mine", ".other.partial-abcdefgh", ".hf.partials"])
def test_what_we_have_not_made_stays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    (path / "notes").write_text("mine")
    if not name.startswith(".hf.partial-"):
        (path / MADE_BY).write_text("{}")  # of another target
    write(tmp_path / "hf", "new")
    assert (path / "notes").read_text() == "mine"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    path = killed(tmp_path / "elsewhere")
    (tmp_path / ".hf.partial-abcdefgh").symlink_to(path)
    write(tmp_path / "hf", "new")
    assert (path / "model.safetensors").is_file()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": '])
def test_a_note_that_was_not_finished(tmp_path: Path, content: str) -> None:
    """Its process may have been killed while it wrote it, or be about to write: only time tells."""
    path = killed(tmp_path / ".hf.partial-abcdefgh")
    (path / MADE_BY).write_text(content)
    write(tmp_path / "hf", "new")
    assert path.is_dir()
    long_ago = time.time() - 7200
    for file in [*path.iterdir(), path]:
        os.utime(file, (long_ago, long_ago))
    write(tmp_path / "hf", "newer")
    assert path.is_dir() == (content == "[]")


def test_another_hosts_counts_as_left_after_an_hour_without_a_change(tmp_path: Path) -> None:
    path = killed(tmp_path / ".hf.partial-abcdefgh", host="elsewhere")
    finish_interrupted(tmp_path / "hf")
    assert path.is_dir()
    long_ago = time.time() - 7200
    for file in [*path.iterdir(), path]:
        os.utime(file, (long_ago, long_ago))
    finish_interrupted(tmp_path / "hf")
    assert not path.exists()


def test_what_another_host_removes_meanwhile_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = killed(tmp_path / ".hf.partial-abcdefgh", host="elsewhere")
    removed = path / "removed"  # by its maker, between listing and looking
    monkeypatch.setattr(Path, "rglob", lambda *_: iter([removed]))
    remove_left(tmp_path, ".hf.partial-")
    assert path.is_dir() and caplog.messages == []


def test_what_lasts_on_another_machine_stays_however_quiet(tmp_path: Path) -> None:
    """Nobody can tell from here that its process has ended; a container of this machine has its boot."""
    killed(tmp_path / "gapo-mega-data-a", host="elsewhere", boot="another", lasting=True)
    killed(tmp_path / "gapo-mega-data-b", host="container", boot=_boot(), lasting=True)
    killed(tmp_path / "gapo-mega-data-c", host="elsewhere", boot="another")
    long_ago = time.time() - 7200
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    remove_left(tmp_path, TEMPORARY)
    stays = {"gapo-mega-data-a"} if _boot() else {"gapo-mega-data-a", "gapo-mega-data-b"}
    assert {path.name for path in tmp_path.iterdir()} == stays


def test_another_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = killed(tmp_path / "gapo-mega-data-a")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    remove_left(tmp_path, TEMPORARY)
    assert path.is_dir()
    monkeypatch.undo()
    remove_left(tmp_path, TEMPORARY)
    assert not path.exists()


def test_what_is_kept_outlives_its_block_for_so_long(tmp_path: Path) -> None:
    for seconds in (-1.0, 1000.0):
        with scratch(tmp_path, f"gapo-mega-vllm{seconds:+.0f}") as (path, maker):
            (path / "vllm.log").write_text("why")
            maker.keep(seconds)
    remove_left(tmp_path, TEMPORARY)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert (path / "vllm.log").read_text() == "why"


def test_what_cannot_be_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = killed(tmp_path / "gapo-mega-data-a")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    remove_left(tmp_path, TEMPORARY)
    assert f"what killed processes left in {tmp_path} is still there: [Errno 13]" in caplog.text
    assert (path / MADE_BY).is_file()  # so that a later run knows it


def test_killed_between_the_two_renames_brings_the_old_one_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / ".hf.replaced-abcdefgh", "old")
    killed(tmp_path / ".hf.partial-abcdefgh", replaced=".hf.replaced-abcdefgh")
    finish_interrupted(tmp_path / "hf")
    assert [found.name for found in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "config.json").read_text() == "old"
    assert "is what it was before a killed process began to replace it" in caplog.text


def test_killed_after_the_second_rename_removes_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / ".hf.replaced-abcdefgh", "old")
    killed(tmp_path / "hf", replaced=".hf.replaced-abcdefgh")
    finish_interrupted(tmp_path / "hf")
    assert [found.name for found in tmp_path.iterdir()] == ["hf"]
    assert [found.name for found in (tmp_path / "hf").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("replaced", ["../precious", "precious", ".hf.replaced-none", 3, None])
def test_a_note_cannot_name_what_the_target_never_was(tmp_path: Path, replaced: object) -> None:
    parent = tmp_path / "runs"
    for directory in (parent, parent / "precious", tmp_path / "precious"):
        directory.mkdir()
    killed(parent / "hf", replaced=replaced)
    killed(parent / ".hf.partial-abcdefgh", replaced=replaced)
    finish_interrupted(parent / "hf")
    assert sorted(path.name for path in parent.iterdir()) == ["hf", "precious"]
    assert (tmp_path / "precious").is_dir()


def test_replacing_leaves_neither_note_nor_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "hf", text)
        assert [path.name for path in tmp_path.rglob("*")] == ["hf", "config.json"]
    assert (tmp_path / "hf" / "config.json").read_text() == "new"
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(KeyError), complete_or_absent(tmp_path / "hf", False) as partial:
        (partial / "config.json").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
