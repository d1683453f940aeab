"""Resuming one process bit for bit."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from traceback import StackSummary
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from gapo_mega.engine.megatron.checkpoint.dist_format import DistReader
from gapo_mega.engine.megatron.checkpoint.failures import cause_in_words
from tests.helpers.ranks import check_checkpoint, worlds
from tests.helpers.ranks.check_checkpoint import Run


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


def test_the_calling_process_writes_the_files(
    tmp_path: Path, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's own strategy starts processes; releases from 0.17 on take it in place of others."""
    write, writers = checkpoint.write_files, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        writers.append(os.getpid())
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_files", recorded)
    alone = worlds.enter(1, 1)
    checkpoint.save(tmp_path, Run({}, alone, seed=1).trainables, {}, alone)
    assert writers == [os.getpid()]


def test_files_are_the_same_with_every_release(tmp_path: Path, world: None) -> None:
    """What is not sharded is in ``common.pt``, which all releases read, and nowhere else."""
    alone = worlds.enter(1, 1)
    run = Run({}, alone, seed=1)
    checkpoint.save(tmp_path, run.trainables, {"a": 1}, alone)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".metadata",
        "metadata.json",
        "common.pt",
        "__0_0.distcp",
    }
    assert set(torch.load(tmp_path / "common.pt", weights_only=True)) == {"about"}
    objects = DistReader(tmp_path).objects
    assert {name for name in objects if "_extra_state" not in name} == {"rng/shard_0_1", "extra/shard_0_1"}


def interrupt(thread: int, function: str) -> None:
    """Ctrl-C as soon as the main thread is in ``function``, or in any case after a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        frame: FrameType | None = sys._current_frames()[thread]
        while frame is not None and frame.f_code.co_name != function:
            frame = frame.f_back
        if frame is not None:
            break
        time.sleep(0.01)
    signal.pthread_kill(thread, signal.SIGINT)


def test_ctrl_c_while_saving_is_no_failure_of_the_disk(tmp_path: Path, world: None) -> None:
    """Torch wraps it as it wraps errors; the command must end with its own exit code."""
    alone = worlds.enter(1, 1)
    run = Run({}, alone, seed=1)
    os.mkfifo(tmp_path / "__0_0.distcp")  # nobody reads it: writing waits for ever
    waiting = threading.Thread(target=interrupt, args=(threading.get_ident(), "write_data"))
    waiting.start()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, run.trainables, {}, alone)
    waiting.join()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError])
def test_ctrl_c_within_a_tensor_is_no_failure_of_the_disk(
    raised: type[BaseException], tmp_path: Path, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There torch closes the archive that is cut short, and raises that this fails."""
    alone = worlds.enter(1, 1)
    run = Run({}, alone, seed=1)
    saving = torch.save

    class Interrupted(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 500:
                raise raised
            return super().write(data)

    def save(value: Any, file: Any) -> None:
        saving(value, Interrupted() if isinstance(value, torch.Tensor) else file)

    monkeypatch.setattr(torch, "save", save)
    try:
        raise KeyboardInterrupt  # of before, which is none of the block's
    except KeyboardInterrupt:
        with pytest.raises(raised):
            checkpoint.save(tmp_path, run.trainables, {}, alone)


def test_a_failure_of_the_disk_names_the_rank(tmp_path: Path, world: None) -> None:
    alone = worlds.enter(1, 1)
    (tmp_path / "__0_0.distcp").mkdir()
    with pytest.raises(OSError, match=r"^checkpoint .* cannot be written \(rank 0: .*Is a directory"):
        checkpoint.save(tmp_path, Run({}, alone, seed=1).trainables, {}, alone)


def test_what_ended_another_rank_is_named(world: None) -> None:
    """Ctrl-C there, which has no words of its own, is a failure here."""
    error = CheckpointException("write", {1: (KeyboardInterrupt(), StackSummary())})
    assert cause_in_words(error) == "rank 1: KeyboardInterrupt"
    error = CheckpointException("write", {1: (OSError("full"), StackSummary())})
    assert cause_in_words(error) == "rank 1: full"
    error = CheckpointException("write", dict.fromkeys([0, 1], (KeyboardInterrupt(), StackSummary())))
    with pytest.raises(KeyboardInterrupt):
        cause_in_words(error)


def test_nothing_is_said_of_what_is_done_on_purpose(
    tmp_path: Path, world: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Newer releases warn of ``common.pt`` and of buffers whose layout they find themselves."""
    alone = worlds.enter(1, 1)
    with caplog.at_level(logging.WARNING):
        run = Run({}, alone, seed=1)
        checkpoint.save(tmp_path, run.trainables, {}, alone)
        checkpoint.load(tmp_path, run.trainables, alone)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("megatron")] == []


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
