"""Held-out answers that one run leaves for others that begin alike."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.runs.identity import settings_of
from gapo_mega.runs.processes import Alone
from gapo_mega.runs.shared_answers import SharedAnswers, digest
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_runs import configuration, trainer

CONTENTS = {"weights": "abc", "held-out rows": "def"}


def record(tmp_path: Path, contents: dict[str, str] = CONTENTS, **sections: Any) -> dict[str, Any]:
    return {"settings": settings_of(configuration(tmp_path, **sections)), "contents": contents}


def test_the_second_run_does_not_ask_the_policy(tmp_path: Path) -> None:
    def run(name: str) -> tuple[Any, list[str]]:
        engine = FakeEngine()
        shared = SharedAnswers(str(tmp_path / "before"), record(tmp_path), 1, Alone())
        work = trainer(tmp_path / name, engine, steps=1, with_report=True, shared=shared)
        assert work.run()
        return work.before, engine.calls

    first, calls = run("first")
    second, fewer = run("second")
    assert second == first and len(first.prompts) == 3
    assert fewer.count("generate") == calls.count("generate") - 1
    facts = [
        json.loads((tmp_path / name / "summary.json").read_text())["objectives"]
        for name in ("first", "second")
    ]
    assert facts[0] == facts[1]


def test_runs_that_answer_at_the_same_time(tmp_path: Path) -> None:
    """Each writes, and none takes away what another one is writing."""
    made = trainer(tmp_path / "run", FakeEngine(), steps=1).heldout.answer()
    folder = tmp_path / "before"
    everyone = [SharedAnswers(str(folder), record(tmp_path), 1, Alone()) for _ in range(8)]
    with ThreadPoolExecutor(len(everyone)) as pool:
        found = list(pool.map(lambda shared: shared.get(lambda: made), everyone))
    assert found == [made] * len(everyone)
    assert [path.name for path in folder.iterdir()] == [f"{digest(record(tmp_path), 1)}.json"]
    assert SharedAnswers(str(folder), record(tmp_path), 1, Alone()).get(lambda: pytest.fail("asked")) == made


def test_what_killed_processes_left_goes_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that has ended writes no more; of another host's nobody knows, but none takes an hour."""
    ended = 9_999_999  # more than any system numbers
    host, digits = socket.gethostname(), "0123456789abcdef" * 2
    left, old = f".{host}.{ended}.{digits}.json", f".other.example.1.{digits}.json"
    stays = [
        f".{host}.{os.getpid()}.{digits}.json",  # being written
        f".elsewhere.{ended}.{digits}.json",
        ".notes.json",
        f".{host}.{ended}.{digits}.txt",
        "answers.json",
    ]
    for name in (left, old, *stays):
        (tmp_path / name).write_text('{"prompts": [')
    (tmp_path / f".{host}.{ended}.{digits[::-1]}.json").symlink_to("answers.json")
    an_hour_ago = time.time() - 3700
    for name in (old, ".notes.json", "answers.json"):
        os.utime(tmp_path / name, (an_hour_ago, an_hour_ago))
    SharedAnswers(str(tmp_path), record(tmp_path), 1, Alone())
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*stays, f".{host}.{ended}.{digits[::-1]}.json"}
    assert f"removed {tmp_path / left}" in caplog.text and f"removed {tmp_path / old}" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 9},
        {"aggregation": {"name": "p_gapo"}},
        {"scalarization": {"name": "gdpo"}},
        {"optimizer": {"lr": 1e-3}},
        {"algorithm": {"kl_beta": 0.3}},
        {"loss": {"name": "grpo"}},
        {"logging": {"progress": True}},
        {"evaluation": {"shown": 3}},
        {"parallel": {"timeout_minutes": 5, "silence_minutes": 1, "phase_minutes": None}},
        {"checkpoint": {"asynchronous": True, "keep_gb": 3, "export_hf": True, "export_to": "s3://bucket/a"}},
        {"evaluation": {"every_steps": 2, "early_stopping_patience": 1}, "checkpoint": {"best": "long"}},
    ],
)
def test_what_comes_later_does_not_matter(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert digest(record(tmp_path, **changed), 1) == digest(record(tmp_path / "elsewhere"), 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 9},
        {"rollout": {"temperature": 0.5}},
        {"rollout": {"max_new_tokens": 5}},
        {"data": {"heldout_prompts": 9}},
        {"data": {"system_prompt": "Be brief."}},
        {"evaluation": {"samples_per_prompt": 2}},
        {"model": {"dtype": "bf16"}},
        {"parallel": {"tensor": 2}},
        {"objectives": [{"name": "long", "function": "m:g"}, {"name": "short", "function": "m:f"}]},
        {"contents": {**CONTENTS, "weights": "other"}},
    ],
)
def test_what_the_answers_follow_from_does(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert digest(record(tmp_path, **changed), 1) != digest(record(tmp_path), 1)
    assert digest(record(tmp_path), 2) != digest(record(tmp_path), 1)


def test_a_file_that_no_run_wrote(tmp_path: Path) -> None:
    path = tmp_path / f"{digest(record(tmp_path), 1)}.json"
    path.write_text('{"prompts": []}')
    with pytest.raises(ValueError, match=f"evaluation.shared: found {path}, which no run has written so"):
        SharedAnswers(str(tmp_path), record(tmp_path), 1, Alone())


class Second:
    """The second of two ranks, which hears what the first one said."""

    rank, size = 1, 2
    is_main = False

    def __init__(self, *said: Any) -> None:
        self._said = list(said)

    def gather(self, value: Any) -> list[Any]:
        return [self._said.pop(0), value]

    def leave(self, value: Any, seconds: float) -> list[Any]:
        return self.gather(value)


def test_every_rank_has_what_rank_0_sees(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", FakeEngine(), steps=1).heldout.answer()
    other = SharedAnswers(str(tmp_path / "gone"), record(tmp_path), 2, Second(None, dataclasses.asdict(made)))
    assert other.get(lambda: pytest.fail("asked the policy")) == made
    assert not (tmp_path / "gone").exists()
    with pytest.raises(ValueError, match="of rank 0"):
        SharedAnswers(str(tmp_path), record(tmp_path), 2, Second("of rank 0"))
