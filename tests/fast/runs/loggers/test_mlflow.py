"""What MLflow's own client finds in a folder."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gapo_mega import optional
from tests.helpers.logged_runs import LAST, PICTURES, finished, log_all, metrics_of

pytestmark = pytest.mark.skipif(not optional.mlflow().usable, reason="mlflow is not installed")


@pytest.fixture
def place(tmp_path: Path) -> str:
    return (tmp_path / "mlruns").as_uri()


def runs_of(place: str) -> tuple[Any, list[Any]]:
    client = importlib.import_module("mlflow").MlflowClient(place)
    experiment = client.get_experiment_by_name("tests")
    return client, list(client.search_runs([experiment.experiment_id]))


def logged(directory: Path, place: str, **how: Any) -> None:
    entry = {"name": "mlflow", "options": {"experiment": "tests", "tracking_uri": place}}
    log_all(directory, entry, **how)


def test_everything_is_there(place: str, tmp_path: Path) -> None:
    directory = finished(tmp_path)
    logged(directory, place)
    client, (run,) = runs_of(place)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    parameters = run.data.params
    assert parameters["objectives.0.function"] == "gapo_mega.demo.rewards:concise"
    assert parameters["rollout.samples_per_prompt"] == "4"
    history = client.get_metric_history(run.info.run_id, "reward/concise")
    assert [(metric.step, metric.value) for metric in history] == [
        (step, metrics_of(step)["reward/concise"]) for step in range(1, LAST + 1)
    ]
    kl = [metric.value for metric in client.get_metric_history(run.info.run_id, "kl")]
    assert kl[1::2] == [0.5, 1.0] and all(math.isnan(value) for value in kl[::2])
    summary = json.loads((directory / "summary.json").read_text())
    found = run.data.metrics["summary/objectives/plain/after"]
    assert found == summary["objectives"]["plain"]["after"]
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (folder / "config.yaml").read_text() == (directory / "config.yaml").read_text()
    for name in (*(f"{picture}.png" for picture in PICTURES), "index.html"):
        assert (folder / "report" / name).read_bytes() == (directory / "report" / name).read_bytes()
    table = json.loads((folder / "heldout.json").read_text())
    assert table["columns"][:3] == ["objective", "before", "after"]
    assert [row[0] for row in table["data"]] == ["concise", "plain"]
    assert len(json.loads((folder / "answers.json").read_text())["data"]) == 6


def test_a_resumed_run_is_the_same_one(place: str, tmp_path: Path) -> None:
    logged(finished(tmp_path), place, resume_at=2)
    client, (run,) = runs_of(place)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "reward/concise")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


def test_a_run_that_begins_anew_is_another(place: str, tmp_path: Path) -> None:
    directory = finished(tmp_path)
    logged(directory, place)
    logged(directory, place)
    assert len(runs_of(place)[1]) == 2


def test_a_place_that_does_not_answer_is_named_at_the_start(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"^logging\.loggers: found mlflow, but mlflow did not start \("
    ) as found:
        logged(finished(tmp_path), (tmp_path / "file" / "below").as_uri())
    assert "\n" not in str(found.value)
