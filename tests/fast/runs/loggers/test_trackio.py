"""What Trackio's own storage holds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from gapo_mega import optional
from tests.helpers.logged_runs import LAST, PICTURES, finished, log_all, metrics_of

pytestmark = pytest.mark.skipif(not optional.trackio().usable, reason="trackio is not installed")


def logged(directory: Path, project: str, **how: Any) -> list[str]:
    """Names of the project's runs."""
    log_all(directory, {"name": "trackio", "options": {"project": project}}, **how)
    return list(storage().get_runs(project))


def storage() -> Any:
    return importlib.import_module("trackio.sqlite_storage").SQLiteStorage


def test_everything_is_there(tmp_path: Path) -> None:
    directory = finished(tmp_path)
    (run,) = logged(directory, "whole")
    assert storage().get_run_config("whole", run)["objectives"][0]["name"] == "concise"
    rows = storage().get_logs("whole", run)
    steps = [row for row in rows if "reward/concise" in row]
    assert [(row["step"], row["reward/concise"]) for row in steps] == [
        (step, metrics_of(step)["reward/concise"]) for step in range(1, LAST + 1)
    ]
    assert ["kl" in row for row in steps] == [False, True, False, True]  # NaN is left out
    summary = json.loads((directory / "summary.json").read_text())
    (numbers,) = [row for row in rows if "summary/seconds" in row]
    assert numbers["summary/objectives/plain/after"] == summary["objectives"]["plain"]["after"]
    (shown,) = [row for row in rows if "heldout" in row]
    assert shown["step"] == LAST
    assert [row["objective"] for row in shown["heldout"]["_value"]] == ["concise", "plain"]
    assert [row["prompt"] for row in shown["answers"]["_value"]] == [f"prompt {i}" for i in range(6)]
    media = importlib.import_module("trackio.utils").MEDIA_DIR
    for name in PICTURES:
        file = media / shown[f"report/{name}"]["file_path"]
        assert (image.imread(file) == image.imread(directory / "report" / f"{name}.png")).all()


def test_a_resumed_run_is_the_same_one(tmp_path: Path) -> None:
    (run,) = logged(finished(tmp_path), "resumed", resume_at=2)
    rows = storage().get_logs("resumed", run)
    assert [row["step"] for row in rows if "reward/concise" in row] == [1, 2, 3, 4]


def test_directories_of_one_name_are_several_runs(tmp_path: Path) -> None:
    logged(finished(tmp_path / "a"), "several")
    assert len(logged(finished(tmp_path / "b"), "several")) == 2
