"""Damaged checkpoints: named, renamed, never loaded, and the run goes on from the newest sound one."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.runs.processes import Alone
from gapo_mega.runs.sound_checkpoints import examine
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.held_runs import lines, on_ranks, snapshot, start

WEIGHTS = random.Random(1).randbytes(50_000)


class Weighty(FakeEngine):
    """Writes something of a size beside its state."""

    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        super().save(directory, extra)
        (directory / "hf").mkdir()
        (directory / "hf" / "config.json").write_text("{}")
        (directory / "__0_0.distcp").write_bytes(WEIGHTS)


def stopped(directory: Path, after: int = 3, **sections: Any) -> None:
    """A run with a checkpoint of every step up to ``after``, where it was stopped."""
    sections["checkpoint"] = {"every_steps": 1, "keep": 9} | sections.get("checkpoint", {})
    assert not start(directory, Weighty(at={("update_policy", after): terminate}), **sections)[0]


def checkpoint(directory: Path, step: int) -> Path:
    return directory / "checkpoints" / f"step_{step:08d}"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def zeros(path: Path) -> None:
    with (path / "__0_0.distcp").open("r+b") as file:
        file.seek(20_000)
        file.write(bytes(4096))


def marked(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / "complete.json").write_bytes(content) and None


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "zeros": (zeros, "__0_0.distcp has other contents than were written"),
    "one bit": (
        lambda path: (path / "__0_0.distcp").write_bytes(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:]) and None,
        "__0_0.distcp has other contents",
    ),
    "truncated": (
        lambda path: os.truncate(path / "__0_0.distcp", 100),
        "__0_0.distcp has 100 bytes, and 50000 were written",
    ),
    "missing": (lambda path: (path / "hf" / "config.json").unlink(), "hf/config.json is missing"),
    "cut list": (
        lambda path: os.truncate(path / "complete.json", 80),
        "complete.json: found what is no JSON",
    ),
    "empty list": (marked(b""), "complete.json: found what is no JSON"),
    "list of zeros": (marked(bytes(900)), "complete.json: found what is no JSON"),
    "no list": (lambda path: (path / "complete.json").unlink(), "complete.json: found none"),
    "another step": (marked(b'{"step": 2}'), "complete.json: found step 2"),
    "no mapping": (marked(b"[3]"), "complete.json: found a list"),
}


@pytest.fixture
def undisturbed(tmp_path: Path) -> list[dict[str, Any]]:
    assert start(tmp_path / "undisturbed", Weighty())[0]
    return lines(tmp_path / "undisturbed")


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(("time", "tokens_per"))} for line in found]


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_run_goes_on_from_the_one_before(
    tmp_path: Path, kind: str, undisturbed: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[kind]
    stopped(tmp_path / "run")
    path = checkpoint(tmp_path / "run", 3)
    damage(path)
    held = {file.relative_to(path): content for file, content in snapshot(path).items()}
    finished, engine = start(tmp_path / "run", Weighty(), checkpoint={"every_steps": 1, "keep": 1})
    assert finished and engine.calls.count("load") == 1 and engine.calls.count("update_policy") == 2
    said = [line for line in caplog.messages if "damaged" in line]
    assert len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith(f"checkpoint {path} is damaged: {reason}")
    assert said[0].endswith("it is now step_00000003.damaged-1, and the run goes on from step_00000002")
    aside = path.with_name("step_00000003.damaged-1")
    assert {file.relative_to(aside): content for file, content in snapshot(aside).items()} == held
    assert names(tmp_path / "run") == ["step_00000003.damaged-1", "step_00000004"]
    assert without_times(lines(tmp_path / "run")) == without_times(undisturbed)


def test_two_in_a_row_and_names_that_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopped(tmp_path)
    checkpoint(tmp_path, 3).with_name("step_00000003.damaged-1").mkdir()
    zeros(checkpoint(tmp_path, 3))
    (checkpoint(tmp_path, 2) / "__0_0.distcp").unlink()
    finished, engine = start(tmp_path, Weighty(), checkpoint={"every_steps": 1, "keep": 9})
    assert finished and engine.calls.count("update_policy") == 3
    assert "it is now step_00000003.damaged-2, and the run goes on from step_00000001" in caplog.text
    assert "it is now step_00000002.damaged-1, and the run goes on from step_00000001" in caplog.text
    sound = [f"step_0000000{step}" for step in (1, 2, 3, 4)]
    aside = ["step_00000002.damaged-1", "step_00000003.damaged-1", "step_00000003.damaged-2"]
    assert names(tmp_path) == sorted([*sound, *aside])


@pytest.mark.parametrize("kinds", [("zeros",) * 3, ("no list", "cut list", "truncated")])
def test_without_a_sound_one_the_run_is_refused_and_nothing_changes(
    tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    stopped(tmp_path)
    for step, kind in enumerate(kinds, 1):
        DAMAGE[kind][0](checkpoint(tmp_path, step))
    before, engine = snapshot(tmp_path), FakeEngine()
    with pytest.raises(ValueError) as caught:
        start(tmp_path, engine)
    line = str(caught.value)
    assert line.startswith(
        f"output_dir: found no sound checkpoint in {tmp_path / 'checkpoints'} (step_00000003"
    )
    assert line.count("step_0000000") == 3 and "\n" not in line
    assert snapshot(tmp_path) == before and engine.calls == []
    assert start(tmp_path, overwrite=True)[0]


def test_a_refused_run_renames_nothing(tmp_path: Path) -> None:
    stopped(tmp_path)
    zeros(checkpoint(tmp_path, 3))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"seed: found 7, but .*step_00000002 was written with 1"):
        start(tmp_path, seed=7)
    assert snapshot(tmp_path) == before


def test_one_of_a_version_without_checksums_is_taken_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(tmp_path)
    marker = checkpoint(tmp_path, 3) / "complete.json"
    about = json.loads(marker.read_text())
    del about["files"]
    marker.write_text(json.dumps(about))
    finished, engine = start(tmp_path, Weighty())
    assert finished and engine.calls.count("update_policy") == 1
    assert caplog.text.count("lists no checksums (another version wrote it): taken as it is") == 1


def test_a_damaged_best_one_is_chosen_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is older than the newest, which is sound."""
    sections: dict[str, Any] = {"checkpoint": {"best": "long", "keep": 1}, "evaluation": {"every_steps": 1}}
    stopped(tmp_path, **sections)
    best = json.loads((checkpoint(tmp_path, 3) / "complete.json").read_text())["best"]["step"]
    assert best < 3, "another engine or seed would be needed"
    zeros(checkpoint(tmp_path, best))
    assert start(tmp_path, Weighty(), **sections)[0]
    assert f"step_0000000{best}.damaged-1, and the run goes on from step_00000003" in caplog.text
    assert "is not there: the best of the evaluations is chosen anew" in caplog.text


def test_what_lies_beside_the_files_does_not_matter(tmp_path: Path) -> None:
    stopped(tmp_path)
    (checkpoint(tmp_path, 3) / "notes.txt").write_text("good")
    finished, engine = start(tmp_path, Weighty())
    assert finished and engine.calls.count("update_policy") == 1


@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json", "hf/config.json"])
def test_ranks_share_the_files_and_come_to_one_answer(tmp_path: Path, name: str) -> None:
    stopped(tmp_path)
    (checkpoint(tmp_path, 3) / name).write_bytes(b"x")
    folder = tmp_path / "checkpoints"
    first, *others = on_ranks(3, lambda everyone, rank: examine(folder, everyone))
    assert others == [first] * 2
    assert first == examine(folder, Alone())
    found: Any = first
    assert found.sound == "step_00000002" and list(found.damaged) == ["step_00000003"]
    assert found.damaged["step_00000003"].startswith(name)


# -- checkpoints that this run has not made ----------------------------------------------------------------


def adopted(directory: Path, step: int) -> Path:
    """Another run's checkpoint of ``step``, copied to a place that this run would number so."""
    stopped(directory.with_name("other"), 1)
    path = checkpoint(directory, step)
    shutil.copytree(checkpoint(directory.with_name("other"), 1), path)
    about = json.loads((path / "complete.json").read_text()) | {"step": step, "updates": step}
    (path / "complete.json").write_text(json.dumps(about))
    return path


def test_another_runs_newer_checkpoint_is_refused_and_stays(tmp_path: Path) -> None:
    """Its settings are the same; only its number would make it the newest."""
    stopped(tmp_path / "run")
    foreign = adopted(tmp_path / "run", 1000)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError) as caught:
        start(tmp_path / "run", Weighty())
    assert f"found {foreign}, a checkpoint of another run than this directory's" in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_run_neither_loads_nor_removes_what_appears_beside_its_checkpoints(tmp_path: Path) -> None:
    """While it trains: another run's checkpoint, and something that only has such a name."""
    (tmp_path / "run").mkdir()

    def appear() -> None:
        (tmp_path / "run" / "checkpoints").mkdir()
        shutil.copytree(other, checkpoint(tmp_path / "run", 2))
        checkpoint(tmp_path / "run", 1000).mkdir()
        (checkpoint(tmp_path / "run", 1000) / "precious").write_text("mine")

    other = adopted(tmp_path / "elsewhere" / "run", 2)
    engine = Weighty(at={("update_policy", 1): appear})
    assert start(tmp_path / "run", engine, checkpoint={"every_steps": 3, "keep": 1})[0]
    assert names(tmp_path / "run") == ["step_00000002", "step_00000004", "step_00001000.damaged-1"]
    kept = tmp_path / "run" / "checkpoints" / "step_00001000.damaged-1" / "precious"
    assert kept.read_text() == "mine"


def test_overwriting_keeps_what_other_runs_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopped(tmp_path / "run")
    adopted(tmp_path / "run", 1000)
    checkpoint(tmp_path / "run", 2000).mkdir()
    (checkpoint(tmp_path / "run", 2000) / "precious").write_text("mine")
    assert start(tmp_path / "run", Weighty(), overwrite=True)[0]
    assert names(tmp_path / "run") == ["step_00001000.kept-1", "step_00002000.kept-1"]
    assert "is no checkpoint of this run: it is now step_00001000.kept-1" in caplog.text


def test_checkpoints_without_the_rest_of_their_run_can_be_gone_on_from(tmp_path: Path) -> None:
    """Copied to another machine, say: the run there is known by the same name."""
    stopped(tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "copy" / "checkpoints")
    finished, engine = start(tmp_path / "copy", Weighty(), checkpoint={"every_steps": 1, "keep": 2})
    assert finished and engine.calls.count("update_policy") == 1
    assert names(tmp_path / "copy") == ["step_00000003", "step_00000004"]
