"""One owner of a directory: who has it, who is stale, what is left behind."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from pathlib import Path

import pytest

from gapo_mega.runs import lock
from gapo_mega.runs.lock import LOCK_FILE, OWNER_FILE, DirectoryLock, check_free, token_in


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path, "gapo-mega train"):
        for second in (DirectoryLock(tmp_path, "gapo-mega sft").acquire, lambda: check_free(tmp_path)):
            with pytest.raises(ValueError) as caught:
                second()
            line = str(caught.value)
            assert line.startswith(
                f"output_dir: found {tmp_path}, which is in use by gapo-mega train, process"
            )
            assert f"process {os.getpid()} on host {socket.gethostname()}, since 2" in line
            assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4};", line) and "\n" not in line
    check_free(tmp_path)
    with DirectoryLock(tmp_path, "gapo-mega sft") as again:
        assert token_in(tmp_path) == again.token


def test_a_refusal_does_not_take_the_first_ones_note(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path, "first") as first:
        second = DirectoryLock(tmp_path, "second")
        with pytest.raises(ValueError, match="in use"):
            second.acquire()
        second.release()
        assert token_in(tmp_path) == first.token
        with pytest.raises(ValueError, match="in use by first"):
            check_free(tmp_path)


def test_an_error_gives_the_directory_back(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DirectoryLock(tmp_path, "train"):
        raise KeyboardInterrupt
    check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_made_and_not_used_goes_again(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b" / "c"
    with DirectoryLock(directory, "train"):
        assert directory.is_dir()
    assert list(tmp_path.iterdir()) == []
    with DirectoryLock(directory, "train"):
        (tmp_path / "a" / "notes").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    with DirectoryLock(tmp_path / "empty", "train"):
        pass
    assert (tmp_path / "empty").is_dir(), "it was there before"


def note(directory: Path, host: str) -> None:
    about = {"command": "gapo-mega train", "pid": 17, "host": host, "since": "2026-01-01", "token": "x"}
    (directory / OWNER_FILE).write_text(json.dumps(about))


def test_what_a_killed_process_left_does_not_block(tmp_path: Path) -> None:
    note(tmp_path, socket.gethostname())
    (tmp_path / LOCK_FILE).write_text("")
    with DirectoryLock(tmp_path, "train") as taken:
        assert token_in(tmp_path) == taken.token


@pytest.mark.parametrize("content", ["", "{", "[]", "17"])
def test_a_note_cut_off_does_not_block(tmp_path: Path, content: str) -> None:
    (tmp_path / OWNER_FILE).write_text(content)
    with DirectoryLock(tmp_path, "train"):
        pass


def test_another_hosts_run_that_still_lives_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system's locks do not reach it, its note is touched now and then."""
    monkeypatch.setattr(lock, "BEAT", 0.1)
    note(tmp_path, "node17")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(tmp_path / OWNER_FILE)

    living = threading.Thread(target=beat)
    living.start()
    try:
        with pytest.raises(
            ValueError, match="in use by gapo-mega train, process 17 on host node17, since 2026"
        ):
            DirectoryLock(tmp_path, "train").acquire()
    finally:
        stop.set()
        living.join()
    assert token_in(tmp_path) == "x"


def test_another_hosts_run_that_was_killed_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    note(tmp_path, "node17")
    with DirectoryLock(tmp_path, "train") as taken:
        assert token_in(tmp_path) == taken.token
    assert "taken over from gapo-mega train, process 17 on host node17" in caplog.text


def test_the_owner_touches_its_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with DirectoryLock(tmp_path, "train"):
        file = tmp_path / OWNER_FILE
        os.utime(file, (0, 0))
        waited = threading.Event()
        for _ in range(1000):
            if file.stat().st_mtime > 0:
                break
            waited.wait(0.01)
        assert file.stat().st_mtime > 0


@pytest.mark.parametrize("below", ["", "below", "far/below"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file" / below, Path("/proc/gapo-mega") / below):
        with pytest.raises(ValueError, match=r"^output_dir: found .*, which cannot be written: ") as caught:
            DirectoryLock(directory, "train").acquire()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == ""
