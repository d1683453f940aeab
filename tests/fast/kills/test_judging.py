"""That the judge of killed runs finds what it is there to find, in directories made by hand."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from tests.helpers.kills.cases import Case, Kill
from tests.helpers.kills.judging import STEPS, Standing, after_kill, at_end
from tests.helpers.kills.running import Attempt

KILL = Kill("score", "SIGTERM", "rank", 0, 0, 0.5, 0.5, None)
HIT = {"phase": "score", "place": "step 3, score"}
STOPPED = Attempt(75, "stopped by a signal after step 2; the same command goes on", 1.0, hit=HIT)
RESUMED = Attempt(0, "resumed from run/checkpoints/step_00000002: 2 of 3 steps done", 1.0)


def case(layout: str = "alone") -> Case:
    return Case(0, layout, "forked", (KILL,))


def write_checkpoint(run: Path, step: int, value: float = 1.0) -> None:
    folder = run / "checkpoints" / f"step_{step:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint.save({"weight": torch.tensor([value, step])}, checkpoint_id=folder, no_dist=True)
    listing = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        listing[path.name] = {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    (folder / "complete.json").write_text(json.dumps({"step": step, "files": listing}))


def write_run(run: Path, steps: int, checkpoints: list[int]) -> Path:
    run.mkdir()
    lines = [json.dumps({"step": step, "kl": 0.5 * step, "time/step": 1.0}) for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    finished = STEPS if steps == STEPS else None
    (run / ".gapo-mega.json").write_text(json.dumps({"finished": finished}))
    for step in checkpoints:
        write_checkpoint(run, step)
    if finished:
        (run / "hf").mkdir()
        (run / "hf" / "model.safetensors").write_bytes(bytes(range(200)))
        (run / "heldout_answers.jsonl").write_text('{"prompt": "a"}\n')
        (run / "report").mkdir()
        (run / "report" / "index.html").write_text("<html></html>\n")
        (run / "summary.json").write_text(json.dumps({"step": 3, "seconds": 2.0}))
    return run


def append(name: str, text: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        with (run / name).open("a") as file:
            file.write(text)

    return change


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_run(tmp_path / "reference", 3, [2, 3])


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    return write_run(tmp_path / "killed", 2, [1, 2])


def judged(killed: Path, reference: Path, attempt: Attempt = STOPPED, layout: str = "alone") -> list[str]:
    return list(after_kill(case(layout), KILL, attempt, killed, reference))


def test_nothing_is_wrong(killed: Path, reference: Path) -> None:
    assert judged(killed, reference) == []
    append("metrics.jsonl", '{"step": 3, "k')(killed)  # killed while it wrote
    assert judged(killed, reference) == []
    assert judged(killed, reference, replace(STOPPED, code=1), layout="2") == []


def test_a_step_more_is_done_while_a_checkpoint_is_written(killed: Path, reference: Path) -> None:
    """But none beyond that one: the next checkpoint waits for it."""
    shutil.rmtree(killed / "checkpoints" / "step_00000002")
    (killed / "metrics.jsonl").write_text((reference / "metrics.jsonl").read_text())
    ended = replace(STOPPED, code=1)
    (fault,) = judged(killed, reference, ended, "2")
    assert fault == "3 steps are in the log, the newest checkpoint is that of 1"
    assert judged(killed, reference, ended, "2-background") == []
    shutil.rmtree(killed / "checkpoints" / "step_00000001")
    (fault,) = judged(killed, reference, ended, "2-background")
    assert fault == "3 steps are in the log, the newest checkpoint is that of 0"


def half_export(run: Path) -> None:
    (run / "hf").mkdir()
    (run / "hf" / "model.safetensors").write_bytes(bytes(range(100)))


def damage(run: Path) -> None:
    (path,) = (run / "checkpoints" / "step_00000002").glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def half_report(run: Path) -> None:
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("<html><p>")


def lose(run: Path) -> None:
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (half_export, "hf/model.safetensors differs"),
        (damage, "is not what was written"),
        (half_report, "report/index.html is cut off"),
        (lose, "2 steps are in the log, the newest checkpoint is that of 0"),
        (append("metrics.jsonl", '{"step": 3, "kl": 9}\n'), "are not those of the undisturbed run"),
        (
            lambda run: (run / "checkpoints" / "step_00000001" / "complete.json").unlink(),
            "step_00000001 has the name of a checkpoint and is none",
        ),
    ],
)
def test_what_is_wrong_after_a_kill(
    killed: Path, reference: Path, change: Callable[[Path], object], found: str
) -> None:
    change(killed)
    assert any(found in fault for fault in judged(killed, reference, replace(STOPPED, code=1), layout="2"))


@pytest.mark.parametrize(
    ("attempt", "found"),
    [
        (replace(STOPPED, code=0), "exit code 0, accepted: [75]"),
        (replace(STOPPED, code=-15), "exit code -15"),
        (replace(STOPPED, log="stopped by a signal after step 1"), "the newest checkpoint is that of 2"),
        (replace(STOPPED, code=None), "the command did not end"),
        (replace(STOPPED, left=["process 7"]), "did not end: process 7"),
    ],
)
def test_wrong_ends(killed: Path, reference: Path, attempt: Attempt, found: str) -> None:
    assert any(found in fault for fault in judged(killed, reference, attempt))


@pytest.mark.parametrize(
    ("signal", "target", "layout", "place", "accepted"),
    [
        ("SIGKILL", "rank", "alone", "step 3, score", {-9}),
        ("SIGKILL", "all", "4", "step 3, score", {-9}),
        ("SIGKILL", "rank", "4", "step 3, score", {1, 76}),
        ("SIGTERM", "rank", "alone", "resuming", {-15}),
        ("SIGINT", "rank", "alone", "before training", {130}),
        ("SIGHUP", "launcher", "1", "step 3, score", {1, 75, 76}),
    ],
)
def test_exit_codes(
    killed: Path, reference: Path, signal: str, target: str, layout: str, place: str, accepted: set[int]
) -> None:
    kill = replace(KILL, signal=signal, target=target)
    attempt = Attempt(None, STOPPED.log, 1.0, hit={"phase": "score", "place": place})
    for code in (-15, -9, -1, 0, 1, 2, 75, 76, 130):
        faults = after_kill(case(layout), kill, replace(attempt, code=code), killed, reference)
        assert any(fault.startswith("exit code") for fault in faults) == (code not in accepted), code


@pytest.mark.parametrize(
    ("signal", "place", "accepted"),
    [("SIGHUP", "start", {-1, 0}), ("SIGINT", "start", {130, 0}), ("SIGTERM", "step 3, checkpoint", {0})],
)
def test_exit_codes_of_a_run_that_was_finished_before(
    reference: Path, signal: str, place: str, accepted: set[int]
) -> None:
    kill = replace(KILL, signal=signal)
    attempt = Attempt(None, "", 1.0, hit={"phase": "resume", "place": place})
    for code in (-15, -9, -1, 0, 1, 2, 75, 76, 130):
        faults = after_kill(case(), kill, replace(attempt, code=code), reference, reference)
        assert any(fault.startswith("exit code") for fault in faults) == (code not in accepted), code


def test_a_run_that_has_gone_on_is_the_same(tmp_path: Path, killed: Path, reference: Path) -> None:
    before = Standing(killed)
    run = write_run(tmp_path / "run", 3, [2, 3])
    (run / "metrics.cut-1.jsonl").write_text('{"step": 3}\n')
    (run / "summary.json").write_text(json.dumps({"step": 3, "seconds": 5.0}))
    assert list(at_end(RESUMED, before, run, reference)) == []
    assert any("exit code 2" in fault for fault in at_end(replace(RESUMED, code=2), before, run, reference))
    other = replace(RESUMED, log="resumed from run/checkpoints/step_00000001")
    assert any("resumed from [1]" in fault for fault in at_end(other, before, run, reference))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda run: write_checkpoint(run, 3, value=1 + 2**-20), "step_00000003: .weight differs"),
        (append(".metrics.partial.jsonl", "half"), "['.metrics.partial.jsonl'] too many"),
        (lambda run: (run / "heldout_answers.jsonl").unlink(), "['heldout_answers.jsonl'] missing"),
        (lambda run: (run / "summary.json").write_text('{"step": 2}'), "summary.json differs"),
        (lambda run: (run / "hf" / "model.safetensors").write_bytes(b""), "hf/model.safetensors differs"),
        (append("metrics.jsonl", '{"step": 4}\n'), "metrics.jsonl differs"),
    ],
)
def test_what_is_wrong_in_the_end(
    tmp_path: Path, killed: Path, reference: Path, change: Callable[[Path], object], found: str
) -> None:
    before = Standing(killed)
    run = write_run(tmp_path / "run", 3, [2, 3])
    change(run)
    faults = list(at_end(RESUMED, before, run, reference))
    assert any(found in fault for fault in faults), faults
