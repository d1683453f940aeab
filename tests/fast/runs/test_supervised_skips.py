"""Runs without rollouts above an engine that skips: told, counted over restarts, ended at a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_engine import terminate
from tests.helpers.supervised_runs import KINDS, Learner, prepared, write_inputs

# Of several gradients the one at fault is named.
MESSAGE = (
    r"^stopped: the gradient (of a )?was not finite in 3 updates in a row \(gradients\.max_nonfinite_steps\)$"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("supervised"))


def train(
    kinds: Any, model: Path, directory: Path, engine: Learner, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[dict[str, Any]]]:
    """The run, and its log."""
    run = prepared(kinds, model, directory, engine, monkeypatch)
    try:
        run.run()
    finally:
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return run, lines


@pytest.mark.parametrize("kinds", KINDS)
def test_skips_that_are_not_in_a_row_are_told_and_the_run_goes_on(
    kinds: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, lines = train(kinds, model, tmp_path, Learner([1, 2, 4, 5, 7]), monkeypatch)
    assert run.finished and run.skips.in_a_row == 0
    assert [line["skipped"] for line in lines] == [1, 1, 0, 1, 1, 0, 1, 0]
    said = [line.replace(" of a ", " ") for line in caplog.messages if "skipped" in line]
    assert said == [f"update {step} skipped: the gradient is not finite" for step in (1, 2, 4, 5, 7)]


@pytest.mark.parametrize("kinds", KINDS)
def test_the_limit_ends_the_run_and_its_log_has_every_step(
    kinds: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Learner([2, 3, 4])
    with pytest.raises(RuntimeError, match=MESSAGE):
        train(kinds, model, tmp_path, engine, monkeypatch)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert engine.updates == 4


@pytest.mark.parametrize("kinds", KINDS)
def test_a_resumed_run_goes_on_counting(
    kinds: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two skips, a signal, one more: three in a row."""
    stopping = Learner([2, 3, 4], at={("update", 3): terminate})
    run, _ = train(kinds, model, tmp_path, stopping, monkeypatch)
    assert not run.finished and run.loop.step == 3
    with pytest.raises(RuntimeError, match=MESSAGE):
        train(kinds, model, tmp_path, Learner([2, 3, 4]), monkeypatch)
