"""A pool of runs: one that fails hurts no other, and each has its own part of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapo_mega.config import Config
from gapo_mega.runs.directory import begin, end
from gapo_mega.runs.lock import DirectoryLock
from gapo_mega.runs.start import wanted
from gapo_mega.runs.sweep import Pool, Room, room
from gapo_mega.runs.sweep_tasks import Task
from tests.helpers.environment import environment


def task(folder: Path, name: str) -> Task:
    config = Config.model_validate(
        {
            "output_dir": str(folder / name),
            "model": {"path": "model"},
            "data": {"source": "package:prompts"},
            "objectives": [{"name": "plain", "function": "gapo_mega.demo.rewards:plain"}],
        }
    )
    return Task(name, "train", folder / "nowhere.yaml", (f"seed={name}",), folder / name, config)


def test_a_run_that_fails_is_told_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    ended: list[Task] = []
    pool = Pool(Room(1, None, 1), lambda name: tmp_path / "logs" / f"{name}.log", ended.append)
    pool.run([task(tmp_path, "1"), task(tmp_path, "2")])
    assert pool.states == {"1": "failed", "2": "failed"} and not ended and not pool.stopped
    told = capsys.readouterr().out
    assert f"1: failed: error: config: file {tmp_path / 'nowhere.yaml'} not found" in told
    assert f"(all of it: {tmp_path / 'logs' / '2.log'})" in told


def test_a_point_that_another_process_has_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And started where that one has left it unfinished, here to fail."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    lock = DirectoryLock(tmp_path / "1", "gapo-mega train")
    lock.acquire()
    looked: list[str] = []

    def log_file(name: str) -> Path:
        looked.append(name)
        return tmp_path / f"{name}.log"

    pool = Pool(Room(2, None, 1), log_file, lambda task: None)
    begin = pool._begin

    def begin_and_let_go(which: Task) -> None:
        begin(which)
        if which.name == "1" and lock.directory.joinpath(".gapo-mega.owner.json").exists():
            assert "1" not in looked, "started although it is in use"
            lock.release()

    monkeypatch.setattr(pool, "_begin", begin_and_let_go)
    pool.run([task(tmp_path, "1")])
    assert "another process has it; waiting" in capsys.readouterr().out
    assert pool.states == {"1": "failed"} and "1" in looked


def test_only_what_has_finished_since_is_handed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [task(tmp_path, name) for name in ("1", "2")]
    for each in tasks:
        assert isinstance(each.config, Config)
        each.directory.mkdir()
        begin(each.directory, wanted(each.config), overwrite=False)
        (each.directory / "summary.json").write_text("{}")
        end(each.directory, each.config.steps)
    ended: list[Task] = []
    pool = Pool(Room(1, None, 1), lambda name: tmp_path / name, ended.append, {"1": "finished", "2": "new"})
    pool.run(tasks)
    assert ended == [tasks[1]] and pool.states == {"1": "finished", "2": "finished"}
    assert capsys.readouterr().out.splitlines() == ["1: finished", "2: finished"]


def test_every_run_has_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    space = Room(2, 2, 3, ["4", "5", "6", "7", "8"])
    assert [space.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,5", "6,7"]
    assert space.environment(2)["CUDA_VISIBLE_DEVICES"] == "4,5", "more runs than there are GPUs share them"
    assert space.environment(0)["OMP_NUM_THREADS"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in Room(1, 2, 1, ["0"]).environment(0)


def test_as_many_runs_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert (room(None, 2, 9).jobs, room(None, 2, 9).threads) == (4, 1)
    assert (room(None, 8, 4).jobs, room(3, None, 8).threads) == (1, 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert (room(None, 2, 64).jobs, room(None, 2, 64).devices) == (2, ["2", "3", "5", "7"])
