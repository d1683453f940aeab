"""The checkpoint folder under interruptions, stopping on signals, and resuming one process bit for bit."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gapo_mega.engine.base import Layout
from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from gapo_mega.runs.checkpoints import MARKER, CheckpointFolder, StopOnSignal
from tests.helpers.ranks import check_checkpoint, worlds
from tests.helpers.ranks.check_checkpoint import Run

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


# -- folder ------------------------------------------------------------------------------------------
def test_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    saved = folder(tmp_path / "checkpoints")
    assert saved.latest() is None
    for step in (9, 10, 100, 12):
        saved.save(step, write_numbers)
    assert sorted(path.name for path in saved.directory.iterdir()) == ["step_00000012", "step_00000100"]
    assert saved.latest() == saved.directory / "step_00000100"
    about = json.loads((saved.path(100) / MARKER).read_text())
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


KILLED = """
import sys, itertools
from pathlib import Path
from gapo_mega.runs.checkpoints import CheckpointFolder
from gapo_mega.engine.base import Layout
from tests.helpers.ranks import worlds
def write_numbers(directory):
    (directory / "sub").mkdir()
    for number in range(20):
        (directory / "sub" / f"{number}.txt").write_text(str(number))
folder = CheckpointFolder(Path(sys.argv[1]), 2, Layout(1, 0, 1, 1, 1, 0, 0, 0), lambda: None)
for step in itertools.count(1):
    folder.save(step, write_numbers)
    if step == 3:
        print("started", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.031])
def test_killed_while_saving(tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        time.sleep(delay)
        child.kill()
    saved = folder(tmp_path)
    newest = saved.latest()
    assert newest is not None
    assert 1 <= len(saved.steps()) <= 3  # 3: killed before the oldest went
    assert len(list((newest / "sub").iterdir())) == 20
    saved.save(10**6, write_numbers)
    assert sorted(path.name for path in tmp_path.iterdir()) == [newest.name, "step_01000000"]


# -- signals -----------------------------------------------------------------------------------------
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


# -- engine state, one process -----------------------------------------------------------------------
@pytest.fixture
def world() -> Iterator[None]:
    yield
    worlds.leave()


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        ("fp32", {}),
        ("fp32", {"distributed": False}),
        ("fp32", {"distributed": False, "name": "sgd", "momentum": 0.9}),
        ("fp32", {"distributed": False, "name": "sgd"}),
        ("bf16", {}),
        ("bf16", {"distributed": False}),
    ],
)
def test_resumed_run_is_the_same_bit_for_bit(
    tmp_path: Path, world: None, dtype: str, optimizer: dict[str, Any]
) -> None:
    children = psutil.Process().children(recursive=True)
    args = {
        "directory": str(tmp_path / "a"),
        "save": [1, 1],
        "load": [],
        "dtype": dtype,
        "optimizer": optimizer,
    }
    check_checkpoint.check(args, check_checkpoint.run(args))
    assert psutil.Process().children(recursive=True) == children  # no writer processes were left


def test_saved_before_the_first_step(tmp_path: Path, world: None) -> None:
    alone = worlds.enter(1, 1)
    original = Run({}, alone, seed=1)
    checkpoint.save(tmp_path, original.trainables, {}, alone)
    resumed = Run({}, alone, seed=2)
    checkpoint.load(tmp_path, resumed.trainables, alone)
    untouched = Run({}, alone, seed=1)  # the same weights; its optimizer makes its own first state
    assert resumed.step(5) == untouched.step(5)
    assert resumed.step(6) == untouched.step(6)


def test_every_parameter_counts_its_own_steps(tmp_path: Path, world: None) -> None:
    alone = worlds.enter(1, 1)
    original = Run({}, alone, seed=1)
    original.step(1)
    checkpoint.save(tmp_path, original.trainables, {}, alone)
    resumed = Run({}, alone, seed=2)
    checkpoint.load(tmp_path, resumed.trainables, alone)
    resumed.step(2)
    states = resumed.trainables["policy"].optimizer.optimizer.state.values()
    assert [float(state["step"]) for state in states] == [2.0] * len(states)
    assert len({id(state["step"]) for state in states}) == len(states)


def test_hyper_parameters_are_the_new_run_s(tmp_path: Path, world: None) -> None:
    alone = worlds.enter(1, 1)
    original = Run({"optimizer": {"lr": 1e-2}}, alone, seed=1)
    for seed in range(10):
        original.step(seed)
    checkpoint.save(tmp_path, original.trainables, {}, alone)
    resumed = Run({"optimizer": {"lr": 1e-3}}, alone, seed=2)
    checkpoint.load(tmp_path, resumed.trainables, alone)
    rates = [run.trainables["policy"].optimizer.param_groups[0]["lr"] for run in (original, resumed)]
    assert rates[0] < 1e-2  # the cosine schedule is past its top
    assert rates[1] == pytest.approx(rates[0] / 10, rel=1e-12)  # the same position, another rate


def test_random_states_stay_with_their_layout(
    tmp_path: Path, world: None, caplog: pytest.LogCaptureFixture
) -> None:
    alone = worlds.enter(1, 1)
    run = Run({}, alone, seed=1)
    checkpoint.save(tmp_path, run.trainables, {}, alone)
    common = torch.load(tmp_path / "common.pt")
    common["about"]["layout"].update(world=2, tensor=2)
    torch.save(common, tmp_path / "common.pt")
    torch.manual_seed(77)
    expected = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        checkpoint.load(tmp_path, run.trainables, alone)
    assert torch.equal(torch.get_rng_state(), expected)
    assert "random-number generators" in caplog.text


def test_wrong_checkpoints_are_refused_by_name(tmp_path: Path, world: None) -> None:
    alone = worlds.enter(1, 1)
    run = Run({}, alone, seed=1)
    with pytest.raises(ValueError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere", run.trainables, alone)
    checkpoint.save(tmp_path / "a", run.trainables, {}, alone)
    with pytest.raises(ValueError, match="critic0"):
        checkpoint.load(tmp_path / "a", {"policy": run.trainables["policy"]}, alone)
    other = Run({"optimizer": {"name": "sgd", "distributed": False}}, alone, seed=1)
    with pytest.raises(ValueError, match="exp_avg"):
        checkpoint.load(tmp_path / "a", other.trainables, alone)
    wider = Run({"vocab": 256, "hidden": 48}, alone, seed=1)
    with pytest.raises(ValueError, match="shape"):
        checkpoint.load(tmp_path / "a", wider.trainables, alone)
    torch.save({"something": "else"}, tmp_path / "a" / "common.pt")
    with pytest.raises(ValueError, match="gapo_mega"):
        checkpoint.load(tmp_path / "a", run.trainables, alone)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/below"):
        checkpoint.save(tmp_path / "file" / "below", run.trainables, {}, alone)
