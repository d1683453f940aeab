"""A run's hold on its directory above a fake engine: what it goes on from, on one rank and on several."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.runs import session
from gapo_mega.runs.identity import Identity, settings_of
from gapo_mega.runs.lock import DirectoryLock
from gapo_mega.runs.processes import agree
from gapo_mega.runs.resume import HELDOUT_ROWS, POLICY, TEMPLATE, TRAINING_ROWS
from gapo_mega.runs.session import Session
from gapo_mega.runs.start import wanted
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.fake_runs import configuration
from tests.helpers.held_runs import (
    COMMAND,
    Threads,
    contents,
    lines,
    on_ranks,
    snapshot,
    start,
    stopped,
)


def test_a_checkpoint_says_in_json_what_it_belongs_to(tmp_path: Path) -> None:
    stopped(tmp_path)
    about = json.loads((tmp_path / "checkpoints" / "step_00000002" / "complete.json").read_text())
    run = about["run"]
    assert run["command"] == COMMAND and about["updates"] == 2
    assert [run["settings"][f"objectives.{i}.name"] for i in (0, 1)] == ["long", "short"]
    assert run["settings"]["algorithm.minibatches"] == 1 and run["settings"]["total_updates"] == 4
    assert run["contents"] == contents() and run["history"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": [{"name": "short", "function": "m:f"}, {"name": "long", "function": "m:f"}]},
         "objectives: found short, long"),
        ({"algorithm": {"minibatches": 2}}, "algorithm.minibatches: found 2"),
        ({"aggregation": {"name": "mgda"}}, "aggregation.name: found mgda"),
        ({"seed": 7}, "seed: found 7"),
        ({"found": contents(**{TRAINING_ROWS: "A"})}, "data.source: found other training rows"),
        ({"found": contents(**{HELDOUT_ROWS: "B"})}, "data.source: found other held-out rows"),
        ({"found": contents(**{POLICY: "C"})}, "model.path: found other weights of the policy"),
        ({"found": contents(**{TEMPLATE: "D"})}, "data.chat_template: found other chat template"),
        ({"found": contents(**{TRAINING_ROWS: "A"}), "data": {"source": "other.jsonl"}},
         "data.source: found other training rows than .* (data.source unused -> other.jsonl)"),
    ],
)  # fmt: skip
def test_another_run_is_refused_and_nothing_is_lost(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stopped(tmp_path)
    before = snapshot(tmp_path)
    engine = FakeEngine()
    with pytest.raises(ValueError) as caught:
        start(tmp_path, engine, **changes)
    first, _, last = message.partition(" .* ")
    assert str(caught.value).startswith(first) and last in str(caught.value)
    assert "\n" not in str(caught.value) and engine.calls == []
    assert snapshot(tmp_path) == before


def test_places_may_change_where_the_contents_are_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(tmp_path)
    assert start(tmp_path, data={"source": "moved.jsonl"}, model={"path": "moved"})[0]
    assert "model.path unused -> moved, data.source unused -> moved.jsonl" in caplog.text
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_what_changes_is_logged_and_the_summary_and_report_say_when(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice resumed with other settings; the schedule's new length is told."""
    stopped(tmp_path, after=1)
    finished, _ = start(
        tmp_path,
        FakeEngine(at={("update_policy", 2): terminate}),
        optimizer={"lr": 1e-4},
        micro_batch_size=4,
        steps=6,
    )
    assert not finished
    assert (
        "from step 1 on with other settings: steps 4 -> 6, micro_batch_size 8 -> 4, optimizer.lr 1e-06 -> "
        in (caplog.text)
    )
    assert "the cosine schedule of optimizer.lr takes 6 optimizer steps now, and not 4" in caplog.text
    same = {"optimizer": {"lr": 1e-3}, "micro_batch_size": 4, "steps": 6}
    assert start(tmp_path, with_report=True, **same)[0]
    resumed = json.loads((tmp_path / "summary.json").read_text())["resumed"]
    assert resumed == [
        {
            "step": 1,
            "changed": {
                "steps": [4, 6],
                "micro_batch_size": [8, 4],
                "optimizer.lr": [1e-6, 1e-4],
                "total_updates": [4, 6],
            },
        },
        {"step": 3, "changed": {"optimizer.lr": [1e-4, 1e-3]}},
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Changed after step 3" in page and "optimizer.lr: 0.0001 → 0.001" in page
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_the_same_run_has_nothing_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopped(tmp_path)
    assert start(tmp_path, with_report=True)[0]
    assert "other settings" not in caplog.text and "cannot be checked" not in caplog.text
    assert "resumed" not in json.loads((tmp_path / "summary.json").read_text())


def test_fewer_steps_than_it_has_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert start(tmp_path, checkpoint={"save_final": True})[0]
    before = lines(tmp_path)
    finished, engine = start(tmp_path, checkpoint={"save_final": True}, steps=2)
    assert finished and "update_policy" not in engine.calls
    assert "the run has done 4 steps and 2 are asked for: nothing more is trained" in caplog.text
    assert lines(tmp_path) == before
    assert not list(tmp_path.glob("metrics.cut-*"))


def test_a_checkpoint_without_a_record_is_resumed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(tmp_path)
    marker = tmp_path / "checkpoints" / "step_00000002" / "complete.json"
    about = json.loads(marker.read_text())
    del about["run"]
    marker.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="has done 2 optimizer steps in 2 steps, this run would have done 4"):
        start(tmp_path, algorithm={"minibatches": 2})
    assert len(lines(tmp_path)) == 2
    assert start(tmp_path)[0]
    assert "says nothing of these settings, which cannot be checked: output_dir, seed, steps" in caplog.text
    assert "training rows, held-out rows" in caplog.text


def test_the_log_of_a_run_without_a_checkpoint_is_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        start(tmp_path, FakeEngine(at={("update_policy", 3): fail}))
    shutil.rmtree(tmp_path / "checkpoints")  # kill -9 would have left none
    text = (tmp_path / "metrics.jsonl").read_text()
    assert len(text.splitlines()) == 2
    assert start(tmp_path)[0]
    assert (tmp_path / "metrics.cut-1.jsonl").read_text() == text
    assert (
        "2 lines of steps after 0, which no checkpoint contains, are now in metrics.cut-1.jsonl"
        in caplog.text
    )


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    assert start(tmp_path, checkpoint={"save_final": True}, with_report=True)[0]
    (tmp_path / "notes.txt").write_text("mine")
    finished, engine = start(tmp_path, overwrite=True, with_report=True, seed=5, aggregation={"name": "mgda"})
    assert finished and "load" not in engine.calls and engine.calls.count("update_policy") == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "resumed" not in json.loads((tmp_path / "summary.json").read_text())
    with pytest.raises(ValueError, match="where a run has ended"):
        start(tmp_path)


def test_a_restarted_worker_does_not_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    finished, engine = start(tmp_path, overwrite=True)
    assert finished and engine.calls.count("load") == 1


def test_a_second_run_is_refused_while_the_first_trains(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        before = snapshot(tmp_path)
        for overwrite in (False, True):
            with pytest.raises(ValueError) as caught:
                start(tmp_path, overwrite=overwrite)
            refused.append(str(caught.value))
        assert snapshot(tmp_path) == before

    assert start(tmp_path, FakeEngine(at={("update_policy", 2): second}))[0]
    assert len(refused) == 2 and all("is in use by gapo-mega train, process" in line for line in refused)


@pytest.mark.parametrize("failing", [0, 2])
def test_ranks_agree_on_the_first_error(failing: int) -> None:
    def check(rank: int) -> None:
        if rank >= failing:
            raise ValueError(f"rank {rank} refuses")

    found = on_ranks(3, lambda everyone, rank: agree(everyone, lambda: check(rank)))
    assert found == [f"rank {failing} refuses"] * 3


def test_all_ranks_hear_that_the_directory_is_taken(tmp_path: Path) -> None:
    config = configuration(tmp_path)

    def work(everyone: Threads, rank: int) -> object:
        Session(config, tmp_path, wanted(config), False, everyone).open()
        return None

    with DirectoryLock(tmp_path, "gapo-mega sft"):
        first, second = on_ranks(2, work)
    assert first == second and "is in use by gapo-mega sft" in str(first)


def test_ranks_that_see_different_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One relative path in two working directories, or a disk of each node's own."""
    monkeypatch.setattr(session, "VISIBLE_WITHIN", 0.2)
    config = configuration(tmp_path)

    def work(everyone: Threads, rank: int) -> object:
        Session(config, tmp_path / str(rank), wanted(config), False, everyone).open()
        return None

    first, second = on_ranks(2, work)
    assert first == second
    assert f"output_dir: rank 0 writes to {tmp_path / '0'}, which another rank does not see" in str(first)
    assert str(tmp_path / "1") in str(first)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_read_different_rows(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run")

    def work(everyone: Threads, rank: int) -> object:
        with Session(config, tmp_path / "run", wanted(config), False, everyone) as held:
            held.check_settings(Identity(COMMAND, settings_of(config)))
            held.check_contents(contents(**{TRAINING_ROWS: str(rank)}), 4, 4)
        return None

    first, second = on_ranks(2, work)
    assert first == second and str(first).startswith("data.source: ranks read different training rows")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_space_is_one_line_before_anything_is_built(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(ValueError) as caught:
            start(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line, place = str(caught.value), tmp_path / "run"
    assert line.startswith(f"output_dir: found {place}, which cannot be written: ") and "\n" not in line
    assert list(tmp_path.iterdir()) == []
