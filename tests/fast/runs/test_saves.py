"""Checkpoints that are written while training goes on: when they are complete, and what ends do with them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.models.checkpoint_files import listing_of, measured, read_marker
from gapo_mega.runs import saves
from gapo_mega.runs.checkpoints import CheckpointFolder
from gapo_mega.runs.saves import Saves
from gapo_mega.whereabouts import moves
from tests.helpers.fake_engine import FakeEngine, layout, terminate
from tests.helpers.held_runs import lines, start

ASYNCHRONOUS = {"every_steps": 1, "keep": 9, "asynchronous": True}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def saved(directory: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (directory / "checkpoints" / f"step_{step:08d}/state.json").read_text()
    )
    return found


def order(engine: FakeEngine) -> str:
    """(u)pdates, (b)egun and (f)inished saves, in order."""
    short = {"update_policy": "u", "save_in_background": "b", "finish_save": "f", "save": "s"}
    return "".join(short.get(call, "") for call in engine.calls)


def slow(looks: int, **at: Any) -> FakeEngine:
    """An engine whose files are written by the look after so many."""
    engine = FakeEngine(at={(name, number): action for name, (number, action) in at.items()})
    engine.looks = looks
    return engine


def full() -> None:
    raise OSError(28, "No space left on device")


def fail() -> None:
    raise KeyError("a reward")


@pytest.mark.parametrize(
    ("looks", "every", "expected"),
    [
        (0, 1, "ubufbufbufbf"),  # written by the next look, after the next step
        (1, 1, "ubufbufbufbf"),  # not by the first one: the next save waits
        (1, 2, "uubuufbf"),  # the second look is after the last step
        (9, 4, "uuuubf"),  # the end waits
    ],
)
def test_training_goes_on_until_the_next_save_or_the_end(
    tmp_path: Path, looks: int, every: int, expected: str
) -> None:
    finished, engine = start(tmp_path / "run", slow(looks), checkpoint={**ASYNCHRONOUS, "every_steps": every})
    assert finished and order(engine) == expected
    assert names(tmp_path / "run") == [f"step_{step:08d}" for step in range(every, 5, every)]


def test_checkpoints_are_those_of_saves_at_once(tmp_path: Path) -> None:
    """Of the step that they are called by, with checksums, and a run goes on from them alike."""
    plain = {"every_steps": 1, "keep": 9}
    assert start(tmp_path / "plain", checkpoint=plain)[0]
    assert start(tmp_path / "run", slow(1), checkpoint=ASYNCHRONOUS)[0]
    for step in range(1, 5):
        ours, theirs = saved(tmp_path / "run", step), saved(tmp_path / "plain", step)
        for state in (ours, theirs):
            state["extra"].pop("seconds")
        assert ours == theirs
        directory = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        assert listing_of(read_marker(directory)) == {"state.json": measured(directory / "state.json")}


def test_what_is_under_way_is_no_checkpoint(tmp_path: Path) -> None:
    """A killed process leaves a folder that the next one removes; it goes on from the one before."""

    class KilledError(BaseException):
        pass

    seen = []

    def kill() -> None:
        seen.extend(names(tmp_path / "run"))
        raise KilledError

    engine = slow(1, update_policy=(3, kill))
    engine.at[("finish_save", 2)] = kill  # nothing is left to save either
    with pytest.raises(KilledError):
        start(tmp_path / "run", engine, checkpoint=ASYNCHRONOUS)
    assert seen[:2] == [".incomplete-step_00000002", "step_00000001"]
    finished, engine = start(tmp_path / "run", slow(1), checkpoint=ASYNCHRONOUS)
    assert finished and order(engine).count("u") == 3
    assert names(tmp_path / "run") == [f"step_{step:08d}" for step in range(1, 5)]


def test_a_signal_waits_for_the_checkpoint(tmp_path: Path) -> None:
    finished, engine = start(
        tmp_path / "run", slow(5, update_policy=(3, terminate)), checkpoint={"asynchronous": True}
    )
    assert not finished and order(engine) == "uuubf"
    assert names(tmp_path / "run") == ["step_00000003"]
    assert start(tmp_path / "run")[0]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("every", [1, 2])
def test_an_error_keeps_the_one_under_way_and_the_last_step(tmp_path: Path, every: int) -> None:
    engine = slow(9, generate=(5, fail))  # held-out prompts come first
    with pytest.raises(KeyError, match="a reward"):
        start(tmp_path / "run", engine, checkpoint={**ASYNCHRONOUS, "every_steps": every})
    done = order(engine).count("u")
    assert done >= 2 and names(tmp_path / "run")[-1] == f"step_{done:08d}"
    assert not [name for name in names(tmp_path / "run") if name.startswith(".")]


def test_a_step_cut_short_keeps_the_one_under_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its own state is lost, but not what was being written when it failed."""

    class Failing(FakeEngine):
        def update_policy(self, *args: Any, **kwargs: Any) -> Any:
            report = super().update_policy(*args, **kwargs)
            if self.calls.count("update_policy") == 3:
                fail()
            return report

    engine = Failing()
    engine.looks = 9
    with pytest.raises(KeyError):
        start(tmp_path / "run", engine, checkpoint=ASYNCHRONOUS)
    assert "step 3 was cut short after its updates had begun" in caplog.text
    assert "the run can go on from step 2" in caplog.text
    assert names(tmp_path / "run") == ["step_00000001", "step_00000002"]


def test_a_writer_that_fails_ends_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has no such checkpoint, and says so; the step that is done by then is saved."""
    engine = slow(0, finish_save=(2, full))
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path / "run", engine, checkpoint=ASYNCHRONOUS)
    assert "the run can go on from step 3" in caplog.text
    assert names(tmp_path / "run") == ["step_00000001", "step_00000003"]
    assert start(tmp_path / "run", checkpoint=ASYNCHRONOUS)[0]
    assert names(tmp_path / "run") == [f"step_{step:08d}" for step in (1, 3, 4)]


def test_a_disk_that_stays_full_leaves_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = slow(0, finish_save=(2, full))
    engine.at[("finish_save", 3)] = full
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path / "run", engine, checkpoint=ASYNCHRONOUS)
    assert "the checkpoint of step 3 could not be written" in caplog.text
    assert "the run can go on from step 1" in caplog.text


@pytest.mark.parametrize("looks", [0, 9])
def test_a_signal_saves_the_step_although_an_older_checkpoint_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, looks: int
) -> None:
    """The older one is waited for first, so long as a way out may take."""
    engine = slow(looks, finish_save=(1, full), update_policy=(3, terminate))
    settings = {**ASYNCHRONOUS, "every_steps": 2}
    finished, _ = start(tmp_path / "run", engine, checkpoint=settings)
    assert not finished and order(engine) == "uubufbf"
    assert "the checkpoint of step 2 could not be written: [Errno 28] No space left" in caplog.text
    assert names(tmp_path / "run") == ["step_00000003"]
    assert start(tmp_path / "run", checkpoint=settings)[0]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def forty_seconds_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a disk that takes so long."""
    clock = itertools.count(0, 40)
    monkeypatch.setattr(saves.time, "monotonic", lambda: float(next(clock)))


def test_a_signal_gives_an_older_checkpoint_up_that_does_not_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands for a disk that takes 40 s a look, and goes again after ten minutes."""
    forty_seconds_a_look(monkeypatch)
    engine = slow(1000, update_policy=(3, terminate))

    def late() -> None:
        engine.looks = 0
        full()

    engine.at[("finish_save", 1)] = late
    finished, _ = start(tmp_path / "run", engine, checkpoint={**ASYNCHRONOUS, "every_steps": 2})
    assert not finished and "waiting for the checkpoint of step 2" in caplog.text
    assert names(tmp_path / "run") == ["step_00000003"]


def test_an_error_saves_the_step_although_an_older_checkpoint_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = slow(9, finish_save=(1, full), update_policy=(4, fail))
    with pytest.raises(KeyError, match="a reward"):
        start(tmp_path / "run", engine, checkpoint={**ASYNCHRONOUS, "every_steps": 2})
    assert "the checkpoint of step 2 could not be written" in caplog.text
    assert names(tmp_path / "run") == ["step_00000003"]


def test_the_end_keeps_the_last_step_although_an_older_checkpoint_fails(tmp_path: Path) -> None:
    engine = slow(9, finish_save=(1, full))
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path / "run", engine, checkpoint={**ASYNCHRONOUS, "every_steps": 3})
    assert names(tmp_path / "run") == ["step_00000004"]


def test_all_ranks_hear_of_what_the_main_one_cannot_complete(tmp_path: Path) -> None:
    """Else they would wait for it in different places."""

    class Second:
        rank, size, is_main = 1, 2, False

        def gather(self, value: Any) -> list[Any]:
            return ["cannot be written: full" if value is None else value, value]

        def leave(self, value: Any, seconds: float) -> list[Any]:
            return self.gather(value)

    folder = CheckpointFolder(tmp_path, 2, layout(rank=1, world=2), lambda: None, Second())
    (tmp_path / ".incomplete").mkdir()
    with pytest.raises(OSError, match="cannot be written: full"):
        folder.complete(1, tmp_path / ".incomplete")


def test_a_writer_that_fails_hides_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = slow(9, finish_save=(2, full), update_policy=(3, fail))
    with pytest.raises(KeyError, match="a reward"):
        start(tmp_path / "run", engine, checkpoint=ASYNCHRONOUS)
    assert "the checkpoint of step 2 could not be written" in caplog.text
    assert "the run can go on from step 1" in caplog.text


def test_a_way_out_waits_so_long_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands for a disk that takes 40 s a look."""
    forty_seconds_a_look(monkeypatch)
    engine = slow(1000, update_policy=(2, fail))
    with pytest.raises(KeyError, match="a reward"):
        start(tmp_path / "run", engine, checkpoint=ASYNCHRONOUS)
    assert "waiting for the checkpoint of step 1, which is being written: 40 s" in caplog.text
    assert "waiting for the checkpoint of step 1, which is being written: 640 s" in caplog.text
    assert "the checkpoint of step 1 could not be written: its files are not written yet" in caplog.text
    assert "there is no complete checkpoint" in caplog.text


def test_the_best_checkpoint_is_there_when_the_end_loads_it(tmp_path: Path) -> None:
    """The policy after step 2 is the best; the end begins while a later step's is still being written."""
    sections: dict[str, Any] = {
        "evaluation": {"every_steps": 1},
        "data": {"source": "unused", "heldout_prompts": 3},
        "checkpoint": {"best": "worst_gain", "asynchronous": True, "keep": 1, "every_steps": 1},
    }
    finished, engine = start(tmp_path / "run", slow(3), with_report=True, **sections)
    assert finished
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"step_{summary['step']:08d}" in names(tmp_path / "run")
    assert engine.calls.count("load") == (0 if summary["step"] == 4 else 1)


def test_a_wait_gets_on_while_files_grow_and_not_on_a_disk_that_hangs(tmp_path: Path) -> None:
    """The rank's own watch ends what does nothing for too long."""
    moved = {}
    for name, grows in (("grows", True), ("hangs", False)):
        engine = slow(20)
        folder = CheckpointFolder(tmp_path / name, 2, engine.layout, engine.barrier)
        under_way = Saves(folder, engine, asynchronous=True)
        under_way.save(1, {}, {}, ())
        (directory,) = (tmp_path / name).iterdir()

        def write(file: Path = directory / "part", grows: bool = grows) -> None:
            with file.open("a") as part:
                part.write("x" * grows)

        engine.looking = write
        before = moves()
        under_way.settle()
        moved[name] = moves() - before
    assert moved["grows"] >= 19 and moved["hangs"] == 0
