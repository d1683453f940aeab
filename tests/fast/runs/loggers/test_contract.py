"""What holds for every logger whose package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import LoggingConfig
from gapo_mega.runs.log import RunLog
from gapo_mega.runs.loggers import build, loggers
from gapo_mega.runs.loggers.base import Table
from tests.helpers.logged_runs import finished, log_all


def usable(name: str) -> bool:
    probe = loggers()[name].probe()
    return probe is None or probe.usable


# That of wandb starts a process: tests/process/runs/loggers has it.
@pytest.fixture(params=sorted(set(loggers()) - {"wandb"}))
def entry(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """An entry of ``logging.loggers`` that stays on this machine."""
    if not usable(request.param):
        pytest.skip(f"{request.param} is not installed")
    options = {"tracking_uri": (tmp_path / "mlruns").as_uri()} if request.param == "mlflow" else {}
    return {"name": request.param, "options": options}


def test_a_whole_run_and_a_resumed_one(
    entry: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_all(finished(tmp_path), entry)
    log_all(finished(tmp_path, "resumed"), entry, resume_at=2)
    assert left_out(caplog) == []


def left_out(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a logger that fails is told by, which would hide it here."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("gapo_mega")]


def test_a_run_without_results_has_none(
    entry: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bare").mkdir()
    log_all(tmp_path / "bare", entry)
    assert left_out(caplog) == []


@pytest.mark.parametrize("name", sorted(loggers()))
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^logging\.loggers\.0\.options \({name}\): found 'colour'"):
        build("logging.loggers.0", name, {"colour": "red"})


@pytest.mark.parametrize("name", [name for name in sorted(loggers()) if not usable(name)])
def test_a_missing_package_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    config = LoggingConfig.model_validate({"loggers": [{"name": name}]})
    with pytest.raises(
        ValueError, match=rf"^logging\.loggers: found {name}, but .*pip install {name}`.*lost: "
    ):
        RunLog(tmp_path / "run", [], config, total_steps=1)
    assert not (tmp_path / "run").exists()


def test_a_cell_of_markdown_stays_one() -> None:
    table = Table(["a|b", "c"], [["x\ny|z", 1 / 3], [None, 2]])
    assert table.as_markdown().splitlines() == [
        "| a\\|b | c |", "| --- | --- |", "| x<br>y\\|z | 0.333333 |", "|  | 2 |"
    ]  # fmt: skip
