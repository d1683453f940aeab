"""The run loop with a work that only counts: when it saves, stops, resumes and finishes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import CheckpointConfig, LoggingConfig
from gapo_mega.runs.log import RunLog
from gapo_mega.runs.loop import RunLoop
from tests.helpers.fake_engine import FakeEngine, terminate

STEPS = 5


class Counting:
    """Logs a line an update and remembers what was asked of it."""

    updates_per_step = 2

    def __init__(self, log: RunLog, during: Mapping[str, Callable[[], None]], total: int = STEPS) -> None:
        self.total_steps = total
        self.events: list[str] = []
        self.value = 0
        self._log = log
        self._during = during

    def _event(self, name: str) -> None:
        self.events.append(name)
        self._during.get(name, lambda: None)()

    def begin(self) -> None:
        self._event("begin")

    def train_step(self, step: int) -> None:
        for update in (2 * step + 1, 2 * step + 2):
            self.value = 3 * self.value + update
            self._log.write(update, {"value": float(self.value)})
        self._event(f"step {step}")

    def finish(self) -> None:
        self._event("finish")

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        self._event(f"load {checkpoint.name}")
        self.value = state["value"]


def start(
    directory: Path,
    during: Mapping[str, Callable[[], None]] | None = None,
    engine: FakeEngine | None = None,
    total: int = STEPS,
    **checkpoint: Any,
) -> tuple[bool, Counting]:
    """A run, from wherever its directory says: whether it finished, and its work."""
    logging = LoggingConfig(tensorboard=False, progress=False)
    log = RunLog(directory, [], logging, 2 * total)
    work = Counting(log, during or {}, total)
    settings = CheckpointConfig.model_validate(checkpoint)
    return RunLoop(work, engine or FakeEngine(), directory, settings, log).run(), work


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").glob("*"))


@pytest.fixture
def whole(tmp_path: Path) -> list[dict[str, Any]]:
    """What a run that nothing disturbed logs."""
    assert start(tmp_path / "whole")[0]
    return lines(tmp_path / "whole")


def test_order_of_events_and_checkpoints(tmp_path: Path) -> None:
    engine = FakeEngine()
    finished, work = start(tmp_path, engine=engine, every_steps=2, keep=2)
    assert finished
    assert work.events == ["begin", "step 0", "step 1", "step 2", "step 3", "step 4", "finish"]
    assert engine.calls == ["save"] * 3  # after steps 2 and 4, and after the last
    assert checkpoints(tmp_path) == ["step_00000004", "step_00000005"]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 2 * STEPS + 1))


def test_without_checkpoints_nothing_is_saved(tmp_path: Path) -> None:
    engine = FakeEngine()
    assert start(tmp_path, engine=engine)[0]
    assert engine.calls == []
    engine = FakeEngine()
    assert start(tmp_path / "kept", engine=engine, save_final=True)[0]
    assert checkpoints(tmp_path / "kept") == ["step_00000005"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_signal_in_any_step(tmp_path: Path, whole: list[dict[str, Any]], step: int, number: int) -> None:
    """The run stops after that step and goes on from there; in the last step nothing is left to stop."""
    during = {f"step {step}": lambda: os.kill(os.getpid(), number)}
    finished, work = start(tmp_path, during)
    last = step == STEPS - 1
    assert finished is last
    assert work.events[-1] == ("finish" if last else f"step {step}")
    if last:
        assert not (tmp_path / "checkpoints").exists()
        return
    assert checkpoints(tmp_path) == [f"step_{step + 1:08d}"]
    finished, work = start(tmp_path)
    assert finished
    rest = [f"step {later}" for later in range(step + 1, STEPS)]
    assert work.events == [f"load step_{step + 1:08d}", "begin", *rest, "finish"]
    assert lines(tmp_path) == whole


@pytest.mark.parametrize("save", [1, 2])
def test_a_signal_while_a_checkpoint_is_written(
    tmp_path: Path, whole: list[dict[str, Any]], save: int
) -> None:
    """The checkpoint is completed; the run stops after the step that follows."""
    engine = FakeEngine(at={("save", save): terminate})
    finished, work = start(tmp_path, engine=engine, every_steps=2)
    assert not finished if save == 1 else finished
    assert work.events[-1] == ("step 2" if save == 1 else "finish")
    if save == 1:
        assert checkpoints(tmp_path) == ["step_00000002", "step_00000003"]
        assert start(tmp_path, every_steps=2)[0]
    assert lines(tmp_path) == whole


def test_a_signal_does_not_interrupt_the_end(tmp_path: Path) -> None:
    finished, work = start(tmp_path, {"finish": terminate})
    assert finished and work.events[-1] == "finish"


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, {"step 1": twice})


def test_a_failing_step_leaves_the_last_checkpoint(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    """What was logged after it is dropped when the run goes on."""

    def fail() -> None:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        start(tmp_path, {"step 3": fail}, every_steps=3)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
    finished, work = start(tmp_path, every_steps=3)
    assert finished and work.events[:3] == ["load step_00000003", "begin", "step 3"]
    assert lines(tmp_path) == whole


def test_a_finished_run_is_finished_again_without_a_step(tmp_path: Path) -> None:
    assert start(tmp_path, save_final=True)[0]
    before = lines(tmp_path)
    finished, work = start(tmp_path, save_final=True)
    assert finished and work.events == ["load step_00000005", "begin", "finish"]
    assert lines(tmp_path) == before


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    assert start(tmp_path, total=2, save_final=True)[0]
    finished, work = start(tmp_path, save_final=True)
    assert finished and work.events == ["load step_00000002", "begin", "step 2", "step 3", "step 4", "finish"]


def test_a_checkpoint_that_is_not_wanted_is_an_error(tmp_path: Path) -> None:
    assert start(tmp_path, save_final=True)[0]
    engine = FakeEngine()
    with pytest.raises(ValueError, match=r"^checkpoint\.resume: found false, but .*step_00000005 is there"):
        start(tmp_path, engine=engine, resume=False)
    assert engine.calls == []
