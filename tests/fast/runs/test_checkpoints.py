"""The checkpoint folder under interruptions, and stopping on signals."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from gapo_mega.engine.base import Layout
from gapo_mega.runs.checkpoints import MARKER, CheckpointFolder, StopOnSignal

ALONE = Layout(world=1, rank=0, tensor=1, pipeline=1, data=1, data_rank=0, tensor_rank=0, pipeline_rank=0)


def folder(directory: Path, keep: int = 2) -> CheckpointFolder:
    return CheckpointFolder(directory, keep, ALONE, lambda: None)


def write_numbers(directory: Path, count: int = 20) -> None:
    (directory / "sub").mkdir()
    for number in range(count):
        (directory / "sub" / f"{number}.txt").write_text(str(number))


def write_half(directory: Path) -> None:
    write_numbers(directory)
    raise KeyboardInterrupt


def test_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    saved = folder(tmp_path / "checkpoints")
    assert saved.latest() is None
    for step in (9, 10, 100, 12):
        saved.save(step, write_numbers)
    assert sorted(path.name for path in saved.directory.iterdir()) == ["step_00000012", "step_00000100"]
    assert saved.latest() == saved.directory / "step_00000100"
    about = json.loads((saved.path(100) / MARKER).read_text())
    assert (saved.path(100) / MARKER).stat().st_mode & 0o777 == 0o600  # it has the run's settings
    assert about["step"] == 100
    assert about["layout"] == {"world": 1, "tensor": 1, "pipeline": 1, "data": 1}
    assert about["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_interrupted_write_leaves_the_previous_one(tmp_path: Path) -> None:
    saved = folder(tmp_path, keep=1)
    saved.save(1, write_numbers)
    with pytest.raises(KeyboardInterrupt):
        saved.save(2, write_half)
    assert saved.latest() == saved.path(1)
    assert len(list(tmp_path.iterdir())) == 2  # the leftover is there, and goes with the next write
    saved.save(3, write_numbers)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_old_ones_go_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    saved = folder(tmp_path, keep=1)
    saved.save(1, write_numbers)

    def write(directory: Path) -> None:
        assert saved.latest() == saved.path(1)
        write_numbers(directory)

    saved.save(2, write)
    assert saved.steps() == [2]


@pytest.mark.parametrize("content", [None, "", '{"step"', '{"step": 6}'])
def test_directory_without_a_right_marker_is_incomplete(tmp_path: Path, content: str | None) -> None:
    saved = folder(tmp_path)
    saved.save(5, write_numbers)
    broken = saved.path(7)
    broken.mkdir()
    if content is not None:
        (broken / MARKER).write_text(content)
    assert saved.latest() == saved.path(5)
    saved.save(6, write_numbers)
    assert not broken.exists()


def test_what_is_not_a_checkpoint_stays(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_00000003").write_text("a file")
    folder(tmp_path).save(1, write_numbers)
    assert (tmp_path / "notes").exists() and (tmp_path / "step_00000003").exists()


def test_same_step_again_replaces(tmp_path: Path) -> None:
    saved = folder(tmp_path)
    saved.save(4, write_numbers)
    saved.save(4, lambda directory: write_numbers(directory, 3))
    assert saved.steps() == [4]
    assert len(list((saved.path(4) / "sub").iterdir())) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_disk_error_names_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/below"):
        folder(tmp_path / "file" / "below").save(1, write_numbers)


def test_only_the_main_rank_changes_directories(tmp_path: Path) -> None:
    other = Layout(world=2, rank=1, tensor=1, pipeline=1, data=2, data_rank=1, tensor_rank=0, pipeline_rank=0)
    calls: list[str] = []
    saved = CheckpointFolder(tmp_path / "none", 1, other, lambda: calls.append("barrier"))
    saved.save(1, lambda directory: calls.append("write"))
    assert not saved.directory.exists()
    assert calls == ["barrier", "write", "barrier", "barrier"]


def test_signals_set_the_flag_and_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with StopOnSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # launchers may send it more than once
    assert {number: signal.getsignal(number) for number in before} == before


def test_second_interrupt_is_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # the signal is handled between two bytecodes
    assert signal.getsignal(signal.SIGINT) == before


def test_a_linked_checkpoint_of_another_run_stays_whole(tmp_path: Path) -> None:
    """Who begins from another run's checkpoint may link it; what goes then is the link."""
    other, saved = folder(tmp_path / "other"), folder(tmp_path / "checkpoints", keep=1)
    original = other.save(1, write_numbers)
    saved.directory.mkdir()
    saved.path(1).symlink_to(original)
    assert saved.latest() == saved.path(1)
    saved.save(2, write_numbers)
    assert [path.name for path in saved.directory.iterdir()] == ["step_00000002"]
    assert other.latest() == original and len(list((original / "sub").iterdir())) == 20


def test_a_linked_checkpoint_is_replaced_by_one_of_the_same_step(tmp_path: Path) -> None:
    other, saved = folder(tmp_path / "other"), folder(tmp_path / "checkpoints")
    original = other.save(1, write_numbers)
    saved.directory.mkdir()
    saved.path(1).symlink_to(original)
    saved.save(1, write_numbers)
    assert not saved.path(1).is_symlink() and [path.name for path in saved.directory.iterdir()] == [
        "step_00000001"
    ]
    assert other.latest() == original
