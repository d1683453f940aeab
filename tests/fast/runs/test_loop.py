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
from gapo_mega.runs.processes import Peers
from gapo_mega.stopping import wait
from tests.helpers.fake_engine import FakeEngine, terminate

STEPS = 5


class Counting:
    """Logs a line an update and remembers what was asked of it. An evaluation is the value once more."""

    updates_per_step = 2

    def __init__(
        self,
        log: RunLog,
        during: Mapping[str, Callable[[], None]],
        total: int = STEPS,
        engine: FakeEngine | None = None,
    ) -> None:
        self.total_steps = total
        self.events: list[str] = []
        self.value = 0
        self._log = log
        self._during = during
        self._engine = engine or FakeEngine()

    def _event(self, name: str) -> None:
        self.events.append(name)
        self._during.get(name, lambda: None)()

    def begin(self) -> None:
        self._event("begin")

    def train_step(self, step: int) -> dict[str, float]:
        self._during.get(f"before {step}", lambda: None)()
        self._engine.changes += 1
        self.value = 3 * self.value + 2 * step + 1
        self._log.write(2 * step + 1, {"value": float(self.value)})
        self.value = 3 * self.value + 2 * step + 2
        self._event(f"step {step}")
        return {"value": float(self.value)}

    def end_step(self, done: int, metrics: Mapping[str, float]) -> None:
        self._during.get(f"end {done}", lambda: None)()
        self._log.write(2 * done, {**metrics, "evaluated": float(self.value)})
        self._during.get(f"report {done}", lambda: None)()

    def finish(self) -> None:
        self._event("finish")

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def in_flight(self, step: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        self._event(f"load {checkpoint.name}")
        self.value = state["value"]


def start(
    directory: Path,
    during: Mapping[str, Callable[[], None]] | None = None,
    engine: FakeEngine | None = None,
    total: int = STEPS,
    everyone: Peers | None = None,
    **checkpoint: Any,
) -> tuple[bool, Counting]:
    """A run, from wherever its directory says: whether it finished, and its work."""
    logging = LoggingConfig(tensorboard=False, progress=False)
    log = RunLog(directory, [], logging, 2 * total)
    engine = engine or FakeEngine()
    work = Counting(log, during or {}, total, engine)
    settings = CheckpointConfig.model_validate(checkpoint)
    return RunLoop(work, engine, directory, settings, log, everyone=everyone).run(), work


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
    assert [line["step"] for line in lines(tmp_path)] == list(
        range(1, 8)
    )  # the last update's comes at the end
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


def fail() -> None:
    raise KeyError("a reward")


def leave() -> None:
    raise SystemExit(0)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_what_fails_before_the_updates_of_a_step_leaves_the_step_before(
    tmp_path: Path, whole: list[dict[str, Any]], step: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError, match="a reward"):
        start(tmp_path, {f"before {step}": fail})
    assert checkpoints(tmp_path) == [f"step_{step:08d}"]
    assert f"the run can go on from step {step}: " in caplog.text
    finished, work = start(tmp_path)
    assert finished and work.events[:3] == [f"load step_{step:08d}", "begin", f"step {step}"]
    assert lines(tmp_path) == whole


def test_nothing_is_saved_before_the_first_step_or_in_the_middle_of_updates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError):
        start(tmp_path, {"before 0": fail})
    with pytest.raises(KeyError):
        start(tmp_path, {"step 2": fail})
    assert checkpoints(tmp_path) == []
    assert "step 3 was cut short after its updates had begun" in caplog.text
    assert "there is no complete checkpoint" in caplog.text


@pytest.mark.parametrize("done", [1, 3, STEPS])
@pytest.mark.parametrize("place", ["end", "report"])
def test_what_fails_after_the_updates_of_a_step_leaves_that_step(
    tmp_path: Path, whole: list[dict[str, Any]], place: str, done: int
) -> None:
    """A reward that fails in an evaluation, a full disk at the log: the run that goes on ends the step."""
    with pytest.raises(ZeroDivisionError):
        start(tmp_path, {f"{place} {done}": lambda: 1 / 0})
    assert checkpoints(tmp_path) == [f"step_{done:08d}"]
    with pytest.raises(ZeroDivisionError):  # nothing is mended yet
        start(tmp_path, {f"{place} {done}": lambda: 1 / 0})
    finished, work = start(tmp_path)
    rest = [f"step {later}" for later in range(done, STEPS)]
    assert finished and work.events == [f"load step_{done:08d}", "begin", *rest, "finish"]
    assert lines(tmp_path) == whole


def test_a_signal_ends_the_wait_of_an_evaluation(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    def never_answered() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        wait(60)

    finished, _ = start(tmp_path, {"end 2": never_answered})
    assert not finished and checkpoints(tmp_path) == ["step_00000002"]
    assert start(tmp_path)[0] and lines(tmp_path) == whole


def test_sys_exit_is_no_end(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"found sys\.exit\(0\)"):
        start(tmp_path, {"before 2": leave})
    assert checkpoints(tmp_path) == ["step_00000002"]


def test_an_end_that_fails_leaves_the_last_step(tmp_path: Path) -> None:
    """As a disk that is full when the model is exported: that can be done again from the checkpoint."""

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        start(tmp_path, {"finish": full})
    assert checkpoints(tmp_path) == [f"step_{STEPS:08d}"]
    finished, work = start(tmp_path)
    assert finished and work.events == [f"load step_{STEPS:08d}", "begin", "finish"]


def test_a_checkpoint_that_cannot_be_written_hides_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyError, match="a reward"):
        start(tmp_path, {"before 3": fail}, FakeEngine(at={("save", 2): full}), every_steps=2)
    assert "the checkpoint of step 3 could not be written" in caplog.text
    assert "the run can go on from step 2" in caplog.text


def test_sighup_is_as_sigterm(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, ignores it
    try:
        finished, _ = start(tmp_path, {"step 1": lambda: os.kill(os.getpid(), signal.SIGHUP)})
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not finished and checkpoints(tmp_path) == ["step_00000002"]


def test_nohup_stays(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert start(tmp_path, {"step 1": lambda: os.kill(os.getpid(), signal.SIGHUP)})[0]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_the_wait_for_a_service(tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    def waiting() -> None:
        terminate()
        wait(600)

    finished, work = start(tmp_path, {"before 3": waiting})
    assert not finished and work.events[-1] == "step 2"
    assert checkpoints(tmp_path) == ["step_00000003"]
    assert start(tmp_path)[0] and lines(tmp_path) == whole


def test_a_signal_does_not_end_a_wait_after_the_updates(tmp_path: Path) -> None:
    """Nothing could be kept of the step then."""

    def waiting() -> None:
        terminate()
        wait(0.5)

    finished, _ = start(tmp_path, {"step 2": waiting})
    assert not finished and checkpoints(tmp_path) == ["step_00000003"]


class Told:
    """Peers of whom the others say so when they leave."""

    is_main = True

    def __init__(self, *others: Any) -> None:
        self.rank, self.size = 0, 1 + len(others)
        self._others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, *[value] * len(self._others)]

    def leave(self, value: Any, seconds: float) -> list[Any]:
        return [value, *self._others]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (None, "rank 1 did not answer within 30 s"),
        ([2, False], "step 3 was cut short"),
        ([3, True], "step 3 was cut short"),
        ([2, True], "the run can go on from step 2"),
    ],
)
def test_ranks_agree_on_what_is_kept(
    tmp_path: Path, other: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError):
        start(tmp_path, {"before 2": fail}, everyone=Told(other))
    assert said in caplog.text
    assert checkpoints(tmp_path) == (["step_00000002"] if other == [2, True] else [])


@pytest.mark.parametrize("every", [0, 1])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(tmp_path: Path, every: int) -> None:
    engine = FakeEngine()

    def spoil() -> None:
        engine.finite = False

    where = "the newest sound checkpoint is .*step_00000003" if every else "there is no sound checkpoint"
    step = 3 if every else STEPS - 1
    with pytest.raises(ValueError, match=f"weights are not finite after step {step + 1}, .*{where}"):
        start(tmp_path, {f"step {step}": spoil}, engine, every_steps=every)
    assert checkpoints(tmp_path) == (["step_00000002", "step_00000003"] if every else [])
