"""A log whose weights are from running means of gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega import aggregation
from gapo_mega.engine.base import GradientReport
from gapo_mega.evaluation.recording import read_recording
from gapo_mega.evaluation.verdicts import Candidate, judge
from gapo_mega.runs.log import JsonLines
from gapo_mega.runs.metrics import step_metrics

NAMES = ["helpful", "harmless", "honest"]


def grams(seed: int) -> list[Tensor]:
    rows = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [row @ row.t() for row in rows]


def write_log(directory: Path, current: list[Tensor], averaged: list[Tensor] | None) -> None:
    (directory / "config.yaml").touch()
    log = JsonLines(directory / "metrics.jsonl")
    log.restart(0)
    for step, gram in enumerate(current):
        seen = None if averaged is None else averaged[step]
        weights = aggregation.build("gapo", p=1)(gram if seen is None else seen)
        report = GradientReport([0.0] * 3, gram, weights, 1.0, 1.0, 1e-6, averaged_gram=seen)
        log.write(
            step + 1,
            step_metrics(
                report,
                NAMES,
                rewards=[0.0] * 3,
                kl=0.0,
                tokens_per_second=1.0,
                peak_memory_bytes=1,
                seconds={},
            ),
        )
    log.close()


def test_methods_see_the_means_and_are_judged_by_the_gradients(tmp_path: Path) -> None:
    current, means = grams(0), grams(1)
    write_log(tmp_path, current, means)
    recording = read_recording(tmp_path, NAMES, averaged=True)
    # Norms and cosines give the matrices back to a few units in the last place.
    torch.testing.assert_close(recording.grams, torch.stack(current), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(recording.seen, torch.stack(means), rtol=1e-9, atol=1e-12)
    (verdict,) = judge([Candidate("gapo", aggregation.build("gapo", p=1), "")], recording)
    np.testing.assert_allclose(verdict.weights, recording.weights, rtol=1e-9)
    expected = [gram @ torch.from_numpy(w) for gram, w in zip(current, verdict.weights, strict=True)]
    np.testing.assert_allclose(verdict.predicted_change, torch.stack(expected).numpy(), rtol=1e-6)


def test_without_means_methods_see_the_gradients(tmp_path: Path) -> None:
    write_log(tmp_path, grams(0), None)
    recording = read_recording(tmp_path, NAMES)
    assert recording.averaged is None and recording.seen is recording.grams


def test_a_log_without_the_means_that_its_weights_are_from(tmp_path: Path) -> None:
    write_log(tmp_path, grams(0), None)
    with pytest.raises(ValueError, match="step 1 has no 'averaged_norm/helpful'"):
        read_recording(tmp_path, NAMES, averaged=True)
