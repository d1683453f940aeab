"""Disks without room: refused before the first step, and before a save. No disk has an exabyte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gapo_mega.engine.base import Layout
from gapo_mega.planning.disk import DiskPlan
from gapo_mega.runs.checkpoints import CheckpointFolder
from gapo_mega.runs.disk_space import bytes_below, check_plan, free_bytes, shown
from gapo_mega.runs.identity import Identity
from gapo_mega.runs.session import Session
from gapo_mega.runs.start import wanted
from tests.helpers.fake_runs import configuration
from tests.helpers.held_runs import on_ranks, snapshot

EXABYTE = 10**18
ALONE = Layout(world=1, rank=0, tensor=1, pipeline=1, data=1, data_rank=0, tensor_rank=0, pipeline_rank=0)


def test_one_line_names_both_numbers_and_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        check_plan(tmp_path / "not" / "there", DiskPlan(EXABYTE, 3, 5 * EXABYTE), 7_000_000)
    line = str(caught.value)
    assert line.startswith("output_dir: found ") and "\n" not in line
    assert f"free in {tmp_path / 'not' / 'there'} beside the 7.0 MB of earlier checkpoints" in line
    assert (
        "the run needs 8000000000.00 GB (3 checkpoints of 1000000000.00 GB and an exported model of" in line
    )
    assert not (tmp_path / "not").exists()


def test_what_earlier_processes_wrote_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = shutil.disk_usage(tmp_path).free
    plan = DiskPlan(free // 2, 3, 0)
    with pytest.raises(ValueError, match="3 checkpoints of"):
        check_plan(tmp_path, plan, 0)
    check_plan(tmp_path, plan, free)
    check_plan(tmp_path, DiskPlan(EXABYTE, 0, 0), 0)  # nothing is written
    assert "could leave no checkpoint, which needs 1000000000.00 GB" in caplog.text
    caplog.clear()
    check_plan(tmp_path, DiskPlan(1, 0, 0), 0)
    assert not caplog.text


def test_every_rank_refuses_and_nothing_is_left(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    config = configuration(directory)

    def work(everyone: object, rank: int) -> object:
        with Session(config, directory, wanted(config), False, everyone) as held:  # type: ignore[arg-type]
            held.check_settings(Identity("gapo-mega train", {}))
            held.check_space(DiskPlan(EXABYTE, 1, 0))
        return None

    first, second = on_ranks(2, work)
    assert first == second and "1 checkpoint of 1000000000.00 GB" in str(first)
    assert list(tmp_path.iterdir()) == []


def test_a_save_without_room_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        (directory / "weights").write_bytes(bytes(1000))

    older = CheckpointFolder(tmp_path, 1, ALONE, lambda: None).save(4, write)
    before = snapshot(tmp_path)
    full = CheckpointFolder(tmp_path, 1, ALONE, lambda: None, least_bytes=EXABYTE)
    with pytest.raises(ValueError) as caught:
        full.save(5, lambda directory: pytest.fail("nothing may be written"))
    line = str(caught.value)
    assert line.startswith("the checkpoint of step 5 is not written: found ") and "\n" not in line
    assert f"free in {tmp_path}, and it needs 1000000000.00 GB; {older} stays whole" in line
    assert snapshot(tmp_path) == before


def test_bytes(tmp_path: Path) -> None:
    assert bytes_below(tmp_path / "none") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(123))
    assert bytes_below(tmp_path) == 123
    assert 0 < free_bytes(tmp_path / "x" / "y") < EXABYTE
    assert (shown(999_949_999), shown(2_500_000_000)) == ("999.9 MB", "2.50 GB")
