"""A user's own logger, and loggers that fail: at the start, in the middle, at the end."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import LoggingConfig
from gapo_mega.runs.log import RunLog, check_logging
from gapo_mega.runs.services import chosen
from tests.helpers.environment import ROOT
from tests.helpers.logged_runs import LAST, finished, log_all, metrics_of

OWN = '''
"""Writes what it is told into a file; fails where it is asked to."""

import json
from dataclasses import dataclass
from pathlib import Path

from gapo_mega.runs.loggers import Logger


@dataclass(kw_only=True)
class Diary(Logger):
    file: str
    fails: str = ""
    token: str = ""

    def _write(self, call, *about):
        if call == self.fails and self.token:
            raise ConnectionError(f"{'.' * 260} refused {self.token}")
        if call == self.fails:
            raise ConnectionError("the service\\nhas gone")
        with Path(self.file).open("a") as file:
            file.write(json.dumps([call, *about]) + "\\n")

    def start(self, about):
        self._write("start", about.name, about.step, about.remembered, about.config.get("seed"))
        about.remember(f"run {about.step}")

    def log(self, step, metrics):
        self._write("log", step, sorted(metrics))

    def conclude(self, outcome):
        self._write("conclude", outcome.step, sorted(outcome.tables), sorted(outcome.pictures))

    def close(self, failed):
        self._write("close", failed)


class Other:
    pass
'''


@pytest.fixture
def diary(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "diary.py").write_text(OWN)
    return {"name": f"{tmp_path / 'diary.py'}:Diary", "options": {"file": str(tmp_path / "diary.jsonl")}}


def read(entry: dict[str, Any]) -> list[list[Any]]:
    path = Path(entry["options"]["file"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_logger_of_one_s_own(diary: dict[str, Any], tmp_path: Path) -> None:
    log_all(finished(tmp_path), diary, resume_at=2)
    keys = sorted(metrics_of(1))
    assert read(diary) == [
        ["start", "run", 0, None, 1],
        *(["log", step, keys] for step in (1, 2)),
        ["close", True],
        ["start", "run", 2, "run 0", 1],
        *(["log", step, keys] for step in (3, 4)),
        ["conclude", LAST, ["answers", "heldout"], ["kl", "rewards"]],
        ["close", False],
    ]


@pytest.mark.parametrize(
    ("fails", "when", "heard"),
    [
        ("log", "step 1", ["start"]),
        ("conclude", "the end of the run", ["start", *["log"] * LAST]),
        ("close", "the end of the run", ["start", *["log"] * LAST, "conclude"]),
    ],
)
def test_one_that_fails_in_the_middle_is_left_out_and_told_once(
    diary: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fails: str,
    when: str,
    heard: list[str],
) -> None:
    directory = finished(tmp_path)
    diary["options"]["fails"] = fails
    log_all(directory, diary)
    (record,) = [record for record in caplog.records if record.name.startswith("gapo_mega")]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"logging.loggers: Diary failed at {when} and is left out from here on (ConnectionError: the service "
        "has gone); metrics.jsonl has every step"
    )
    assert [row[0] for row in read(diary)] == heard
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, LAST + 1))


def test_one_that_does_not_start_ends_the_run_in_one_line(diary: dict[str, Any], tmp_path: Path) -> None:
    diary["options"]["fails"] = "start"
    with pytest.raises(ValueError) as found:
        log_all(finished(tmp_path), diary)
    assert str(found.value) == (
        f"logging.loggers: found {diary['name']}, but Diary did not start (ConnectionError: the service has "
        "gone); accepted: one that does, or leave it out"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "wandv",
            r"^logging\.loggers\.0\.name: found 'wandv' \(did you mean 'wandb'\?\), accepted: mlflow, ",
        ),
        ("FOLDER/diary.py:Other", r"^logging\.loggers\.0\.name: .*Other"),
        ("FOLDER/diary.py:Diary", r"^logging\.loggers\.0\.options \(.*Diary\): missing .*'file'"),
    ],
)
def test_names_and_options_are_checked_before_any_work(
    diary: dict[str, Any], tmp_path: Path, name: str, message: str
) -> None:
    config = LoggingConfig.model_validate({"loggers": [{"name": name.replace("FOLDER", str(tmp_path))}]})
    with pytest.raises(ValueError, match=message):
        check_logging(config)


def test_an_entry_takes_the_place_of_the_short_form() -> None:
    config = LoggingConfig.model_validate({"loggers": [{"name": "tensorboard"}]})
    (found,) = chosen(config)
    assert found.setting == "logging.loggers"
    with pytest.raises(ValueError, match="accepted: every name once"):
        LoggingConfig.model_validate({"loggers": [{"name": "tensorboard"}] * 2})


def test_other_ranks_tell_nobody(diary: dict[str, Any], tmp_path: Path) -> None:
    config = LoggingConfig.model_validate({"loggers": [diary]})
    with RunLog(tmp_path / "run", [], config, LAST, enabled=False) as log:
        log.truncate_after(0)
        log.write(1, metrics_of(1))
        log.end_steps()
        log.conclude()
    assert read(diary) == [] and not (tmp_path / "run").exists()


def test_a_broken_memory_begins_new_runs(
    diary: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = finished(tmp_path)
    (directory / "loggers.json").write_text("[1")
    log_all(directory, diary, resume_at=2)
    assert [row[3] for row in read(diary) if row[0] == "start"] == [None, "run 0"]
    assert any("loggers.json is not as a run writes it" in record.getMessage() for record in caplog.records)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "loggers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# diary\.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "diary.py").write_text(code)
    directory = finished(tmp_path)
    log_all(directory, {"name": f"{tmp_path / 'diary.py'}:Diary"}, resume_at=2)
    assert (directory / "diary.txt").read_text().splitlines() == [
        "begins after step 0, seed 1",
        *("step 1: KL nan", "step 2: KL 0.5", "failed"),
        "begins after step 2, seed 1",
        *("step 3: KL nan", "step 4: KL 1", "tables heldout, answers; pictures kl, rewards", "ended"),
    ]


def test_a_secret_of_the_environment_reaches_the_logger_alone(
    diary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DIARY_TOKEN", "visible-19ab")
    for fails in ("start", "log"):
        diary["options"] |= {"fails": fails, "token": "env:DIARY_TOKEN"}
        told = caplog.text
        try:
            log_all(finished(tmp_path, fails), diary)
        except ValueError as error:
            told = str(error)
        told += caplog.text
        assert "refused ***" in told and "visible" not in told
    monkeypatch.delenv("DIARY_TOKEN")
    with pytest.raises(
        ValueError, match=r"^logging\.loggers\.0\.options\.token: found 'env:DIARY_TOKEN', but"
    ):
        check_logging(LoggingConfig.model_validate({"loggers": [diary]}))
