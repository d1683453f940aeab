"""Data frames of logs, against the lines of the files themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import gapo_mega
from gapo_mega import optional
from gapo_mega.evaluation.finished_run import read_run
from gapo_mega.evaluation.standing import Standing
from gapo_mega.evaluation.summary import read_summary, write_summary
from tests.helpers.finished_runs import write_run

pytestmark = pytest.mark.skipif(not optional.pandas().usable, reason="pandas is not installed")

ROWS: list[dict[str, Any]] = [
    {
        "step": 1,
        "reward/concise": 0.1,
        "reward/plain": 2,
        "weight/concise": 0.7,
        "cosine/concise/plain": -0.5,
    },
    {"step": 2, "reward/concise": None, "reward/plain": 3, "kl": 0.25, "grad_norm/kl": 1.5},
    {
        "step": 3,
        "reward/concise": 0.3,
        "reward/plain": 4,
        **{"heldout/concise": 0.5, "heldout_gain/concise": 0.2, "heldout_gain_error/concise": None},
        **{"heldout/plain": 1, "heldout_gain/plain": -0.25, "heldout_gain_error/plain": 0.125},
    },
]


def running(folder: Path, rows: list[dict[str, Any]] = ROWS, cut: str = "") -> Path:
    """A run that has not ended; ``cut``: the beginning of a line that is being written."""
    directory = write_run(folder, "run", seed=1, shift=0.5).directory
    (directory / "summary.json").unlink()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    return directory


def test_steps_are_the_lines_of_the_log(tmp_path: Path) -> None:
    steps = gapo_mega.read_run(running(tmp_path, cut='{"step": 4, "rew')).steps
    assert list(steps["step"]) == [1, 2, 3] and steps["step"].dtype == "int64"
    keys = list(dict.fromkeys(key for row in ROWS for key in row))
    assert list(steps.columns) == keys
    for index, row in enumerate(ROWS):
        for key in keys:
            value, found = row.get(key), steps[key][index]
            assert math.isnan(found) if value is None else found == value, (index, key)
    assert set(map(str, steps.dtypes[1:])) == {"float64"}


def test_the_long_form_has_every_number_of_an_objective(tmp_path: Path) -> None:
    found = gapo_mega.read_run(str(running(tmp_path))).objectives
    expected = {
        (row["step"], key.split("/")[1], key.split("/")[0]): value
        for row in ROWS
        for key, value in row.items()
        if key.count("/") == 1 and not key.startswith("heldout")
    }
    told = {(row.step, row.objective, row.quantity): row.value for row in found.itertuples()}
    assert told.keys() == expected.keys()
    for key, value in expected.items():
        assert math.isnan(told[key]) if value is None else told[key] == value
    pivoted = found[found["quantity"] == "reward"].pivot(index="step", columns="objective", values="value")
    assert list(pivoted["plain"]) == [2.0, 3.0, 4.0]


def test_the_gradient_of_the_divergence_is_told_like_an_objective_s(tmp_path: Path) -> None:
    rows = [{"step": 1, "grad_norm/kl": 0.5, "reward/plain": 1.0}]
    found = gapo_mega.read_run(running(tmp_path, rows)).objectives
    assert [tuple(row) for row in found.itertuples(index=False)] == [
        (1, "kl", "grad_norm", 0.5),
        (1, "plain", "reward", 1.0),
    ]


def test_numbers_of_a_step_are_no_objective_s_whatever_its_name(tmp_path: Path) -> None:
    rows = [{"step": 1, "reward/plain": 1.0, "time/plain": 3.0, "correction/plain": 1.0, "memory/plain": 2.0}]
    found = gapo_mega.read_run(running(tmp_path, rows)).objectives
    assert list(found["quantity"]) == ["reward"]


def test_held_out_curves(tmp_path: Path) -> None:
    found = gapo_mega.read_run(running(tmp_path)).heldout
    assert list(found.columns) == ["step", "objective", "score", "gain", "gain_error"]
    first, second = found.itertuples(index=False)
    assert tuple(first)[:4] == (3, "concise", 0.5, 0.2) and math.isnan(first.gain_error)
    assert tuple(second) == (3, "plain", 1.0, -0.25, 0.125)
    none = gapo_mega.read_run(running(tmp_path / "other", ROWS[:2])).heldout
    assert len(none) == 0 and list(none.columns) == list(found.columns)


def test_a_run_that_has_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", seed=1, shift=0.5)
    frames = gapo_mega.read_run(run.directory)
    for row in frames.summary.itertuples():
        change = run.summary[row.objective]
        found = (row.before, row.after, row.standard_error, row.samples)
        assert found == (change.before, change.after, change.standard_error, change.samples)
    (about,) = frames.runs.itertuples()
    assert (about.steps, about.ended, about.seconds) == (20, True, run.cost.seconds)
    told = json.loads((run.directory / "summary.json").read_text()).get("step")
    assert about.of_step == told if told is not None else math.isnan(about.of_step)
    (about,) = gapo_mega.read_run(running(tmp_path / "other")).runs.itertuples()
    assert (about.steps, about.ended, math.isnan(about.seconds)) == (3, False, True)


def test_a_run_that_trains_on_has_not_ended(tmp_path: Path) -> None:
    """Its summary is that of the end before, and stays until the next one."""
    for minibatches, ended in ((1, False), (2, True)):
        algorithm = {"minibatches": minibatches}
        directory = write_run(tmp_path, str(minibatches), 1, 0.5, algorithm=algorithm).directory
        summary = json.loads((directory / "summary.json").read_text())
        write_summary(
            directory / "summary.json", read_summary(directory / "summary.json")[0], summary["seconds"],
            standing=Standing(4, 10, 10, ended=True),
        )  # fmt: skip
        frames = gapo_mega.read_run(directory)
        (about,) = frames.runs.itertuples()
        assert (about.ended, len(frames.summary)) == (ended, 2 * ended)
        if not ended:
            with pytest.raises(
                ValueError, match=r"^run directory: found .* of 10 rollout .* has 20 optimizer"
            ):
                read_run(directory)


def test_a_sweep_has_the_columns_of_its_points(tmp_path: Path) -> None:
    points = tmp_path / "sweep" / "points"
    preferences = {"a": (0.25, 0.75), "b": (0.75, 0.25)}
    for name, preference in preferences.items():
        aggregation = {"name": "p_gapo", "options": {"preference": list(preference)}}
        write_run(points, name, seed=7, shift=0.5, aggregation=aggregation)
    write_run(points, "c", seed=8, shift=0.5, scalarization={"name": "gdpo", "options": {}})
    (points / "d-not-begun").mkdir()
    frames = gapo_mega.read_run(tmp_path / "sweep")
    for frame in (frames.steps, frames.summary, frames.runs, frames.heldout, frames.objectives):
        assert list(frame.columns[:4]) == ["run", "method", "preference", "seed"]
    runs = frames.runs.set_index("run")
    assert dict(runs["method"]) == {"a": "p_gapo", "b": "p_gapo", "c": "gdpo"}
    assert dict(runs["seed"]) == {"a": 7, "b": 7, "c": 8}
    assert {name: runs["preference"][name] for name in preferences} == preferences
    assert runs["preference"]["c"] is None
    assert list(frames.steps.groupby("run")["step"].count()) == [20, 20, 20]


def test_runs_on_data_have_measures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "heldout/loss": 0.25}\n')
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    frames = gapo_mega.read_run(tmp_path)
    assert frames.steps["loss"][0] == 0.5 and len(frames.objectives) == 0
    ((step, name, score, *_),) = frames.heldout.itertuples(index=False)
    assert (step, name, score) == (2, "loss", 0.25)


@pytest.mark.parametrize("name", ["absent", "empty", "sweep"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep" / "points" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^run directory: found no steps in .*accepted: a directory that"):
        gapo_mega.read_run(tmp_path / name)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    directory = running(tmp_path)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2: found .*, accepted: a JSON object"):
        gapo_mega.read_run(directory)


def test_without_pandas_it_says_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "pandas", lambda: optional.Probe(False, "not installed", "frames"))
    with pytest.raises(ValueError, match=r"^read_run: pandas is not installed; run `pip install pandas`"):
        gapo_mega.read_run(tmp_path)
