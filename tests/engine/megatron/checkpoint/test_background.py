"""Files that are written while training goes on: of the state at the save, whole, or an error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from gapo_mega.engine.megatron.checkpoint.background import BackgroundSave, HeldFiles
from gapo_mega.models.checkpoint_files import measured, names_in
from tests.helpers.ranks import check_checkpoint, worlds
from tests.helpers.ranks.check_checkpoint import Run


@pytest.fixture
def world() -> Iterator[None]:
    yield
    worlds.leave()


def everywhere(holds: bool) -> bool:
    return holds


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("fp32", {"distributed": False}),
        ("bf16", {"distributed": False, "name": "sgd", "momentum": 0.9}),
    ],
)
def test_what_is_written_late_is_the_state_at_the_save(
    tmp_path: Path, world: None, dtype: str, optimizer: dict[str, Any]
) -> None:
    children = psutil.Process().children(recursive=True)
    args = {"directory": str(tmp_path / "a"), "save": [1, 1], "load": [], "dtype": dtype}
    args |= {"optimizer": optimizer, "background": True}
    check_checkpoint.check(args, check_checkpoint.run(args))
    assert psutil.Process().children(recursive=True) == children


def test_files_are_those_of_a_save_at_once(tmp_path: Path, world: None) -> None:
    alone = worlds.enter(1, 1)
    run = Run({}, alone, seed=1)
    run.step(1)
    at_once, late = tmp_path / "at once", tmp_path / "late"
    checkpoint.save(at_once, run.trainables, {"a": 1}, alone)
    held = HeldFiles(late)
    checkpoint.save(late, run.trainables, {"a": 1}, alone, writer=held)
    assert "__0_0.distcp" not in names_in(late) and ".metadata" not in names_in(late)
    background = BackgroundSave(late, held, everywhere)
    assert background.wait(60)
    files = background.finish()
    assert names_in(late) == names_in(at_once)
    # .metadata has an identity of its own and the folder's name
    for name in set(names_in(late)) - {".metadata"}:
        assert measured(late / name) == measured(at_once / name), name
    assert files == {"__0_0.distcp": measured(late / "__0_0.distcp")}


def test_a_disk_that_refuses_is_an_error_at_the_end(tmp_path: Path, world: None) -> None:
    alone = worlds.enter(1, 1)
    held = HeldFiles(tmp_path)
    checkpoint.save(tmp_path, Run({}, alone, seed=1).trainables, {}, alone, writer=held)
    (tmp_path / "__0_0.distcp").mkdir()
    background = BackgroundSave(tmp_path, held, everywhere)
    assert background.wait(60)
    with pytest.raises(OSError, match=r"cannot be written \(rank 0\): IsADirectoryError") as caught:
        background.finish()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / ".metadata").exists()


def test_a_disk_that_hangs_is_given_up(tmp_path: Path, world: None) -> None:
    """A pipe that nobody reads takes nothing."""
    alone = worlds.enter(1, 1)
    held = HeldFiles(tmp_path)
    checkpoint.save(tmp_path, Run({}, alone, seed=1).trainables, {}, alone, writer=held)
    os.mkfifo(tmp_path / "__0_0.distcp")
    background = BackgroundSave(tmp_path, held, everywhere)
    assert not background.wait(0.2)
    with pytest.raises(OSError, match=r"\(rank 0\): its files are not written yet"):
        background.finish()
    with (tmp_path / "__0_0.distcp").open("rb") as reader:  # so that the thread comes to its end
        while reader.read(1 << 20):
            pass
    assert background.wait(60)
