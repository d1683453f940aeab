"""The run log: keys, numbers against their definitions, truncation, sinks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gapo_mega import optional
from gapo_mega.config import LoggingConfig
from gapo_mega.engine.base import GradientReport, PolicyFacts
from gapo_mega.runs.log import RunLog, progress_text
from gapo_mega.runs.metrics import step_metrics

NAMES = ["helpful", "harmless", "honest"]
QUIET = LoggingConfig(tensorboard=False, progress=False)


def report(gram: torch.Tensor, weights: torch.Tensor, **changes: object) -> GradientReport:
    facts: dict[str, object] = {
        "losses": [0.1, 0.2, 0.3],
        "gram": gram,
        "weights": weights,
        "gradient_norm": float((weights @ gram @ weights).sqrt()),
        "clip_factor": 0.5,
        "learning_rate": 1e-6,
        "seconds": {"gram": 0.25},
    }
    return GradientReport(**(facts | changes))  # type: ignore[arg-type]


def metrics_of(gradients: GradientReport) -> dict[str, float]:
    return step_metrics(
        gradients,
        NAMES,
        rewards=[1.0, 2.0, 3.0],
        kl=0.01,
        tokens_per_second=100.0,
        peak_memory_bytes=2**30,
        seconds={"rollout": 1.5},
        extra={"value_loss": 0.7},
    )


def test_step_metrics_match_the_gradients_themselves() -> None:
    rows = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[2] *= 1e-3
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    metrics = metrics_of(report(rows @ rows.T, weights))
    direction = weights @ rows
    for i, name in enumerate(NAMES):
        # Both sides are float64 sums of 50 products.
        assert metrics[f"grad_norm/{name}"] == pytest.approx(float(rows[i].norm()), rel=1e-12)
        assert metrics[f"predicted_change/{name}"] == pytest.approx(float(direction @ rows[i]), rel=1e-10)
        assert metrics[f"weight/{name}"] == float(weights[i])
        assert metrics[f"reward/{name}"] == i + 1
    pairs = {key for key in metrics if key.startswith("cosine/")}
    assert pairs == {"cosine/helpful/harmless", "cosine/helpful/honest", "cosine/harmless/honest"}
    expected = torch.nn.functional.cosine_similarity(rows[0], rows[2], dim=0)
    assert metrics["cosine/helpful/honest"] == pytest.approx(float(expected), rel=1e-10)


def test_step_metrics_of_running_means() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, means = torch.randn(2, 3, 50, dtype=torch.float64, generator=generator)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    metrics = metrics_of(report(rows @ rows.T, weights, averaged_gram=means @ means.T))
    for i, name in enumerate(NAMES):
        assert metrics[f"grad_norm/{name}"] == pytest.approx(float(rows[i].norm()), rel=1e-12)
        assert metrics[f"averaged_norm/{name}"] == pytest.approx(float(means[i].norm()), rel=1e-12)
        expected = float(weights @ rows @ rows[i])
        assert metrics[f"predicted_change/{name}"] == pytest.approx(expected, rel=1e-10)
    cosine = torch.nn.functional.cosine_similarity(means[0], means[2], dim=0)
    assert metrics["averaged_cosine/helpful/honest"] == pytest.approx(float(cosine), rel=1e-10)
    assert not any("averaged" in key for key in metrics_of(report(rows @ rows.T, weights)))


def test_step_metrics_has_every_documented_key() -> None:
    metrics = metrics_of(report(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)))
    assert {"kl", "clip_factor", "gradient_norm", "learning_rate", "skipped", "value_loss"} < set(metrics)
    assert {"tokens_per_second", "memory/peak_bytes", "time/rollout", "time/gram"} < set(metrics)
    for prefix in ("reward", "grad_norm", "weight", "predicted_change", "loss"):
        assert {f"{prefix}/{name}" for name in NAMES} < set(metrics)


@pytest.mark.parametrize("entropy", [None, 2.5])
def test_step_metrics_has_what_was_measured_of_the_policy(entropy: float | None) -> None:
    facts = PolicyFacts(
        clipped={"low": [0.1, 0.2, 0.3], "high": [0.4, 0.5, 0.6]},
        kl=0.01,
        ratio_min=0.5,
        ratio_max=1.5,
        entropy_estimate=2.0,
        entropy=entropy,
    )
    gradients = report(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), policy=facts)
    metrics = metrics_of(gradients)
    assert metrics["clip_fraction_low/helpful"] == 0.1 and metrics["clip_fraction_high/honest"] == 0.6
    assert (metrics["kl_old_new"], metrics["entropy_estimate"]) == (0.01, 2.0)
    assert (metrics["ratio_min"], metrics["ratio_max"]) == (0.5, 1.5)
    assert metrics.get("entropy") == entropy


def test_corner_and_zero_gradient_and_nonfinite() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    corner = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    metrics = metrics_of(report(gram, corner, excluded=[2], nonfinite=[0]))
    assert metrics["corner"] == 1
    assert metrics["excluded/honest"] == 1 and metrics["excluded/helpful"] == 0
    assert metrics["nonfinite/helpful"] == 1 and metrics["nonfinite/honest"] == 0
    assert math.isnan(metrics["cosine/helpful/honest"]) and metrics["cosine/helpful/harmless"] == 0


def simple(value: float) -> dict[str, float]:
    names = {f"{key}/{name}": value for key in ("reward", "weight") for name in NAMES}
    cosines = {"cosine/helpful/harmless": value, "cosine/helpful/honest": -1.0, "cosine/harmless/honest": 0.0}
    return names | cosines | {"tokens_per_second": 12.0, "skipped": 0.0}


def write_steps(directory: Path, steps: range, config: LoggingConfig = QUIET) -> None:
    with RunLog(directory, NAMES, config, total_steps=10) as log:
        for step in steps:
            log.write(step, simple(0.1 * step))


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole", range(1, 9))
    write_steps(tmp_path / "killed", range(1, 8))
    file = tmp_path / "killed" / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"step": 8, "reward/hel')  # killed while writing
    with RunLog(tmp_path / "killed", NAMES, QUIET, total_steps=10) as log:
        log.truncate_after(4)
        for step in range(5, 9):
            log.write(step, simple(0.1 * step))
    assert file.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert sorted(path.name for path in file.parent.iterdir()) == ["metrics.jsonl"]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 3))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_each_step_is_on_disk_at_once_and_not_finite_becomes_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path, NAMES, QUIET, total_steps=2)
    log.write(1, simple(math.nan) | {"kl": math.inf, "loss": 0.1 + 0.2})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["step"] == 1 and line["kl"] is None and line["reward/helpful"] is None
    assert line["loss"] == 0.1 + 0.2
    log.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", NAMES, LoggingConfig(), total_steps=2, enabled=False) as log:
        log.truncate_after(0)
        log.write(1, simple(1.0))
    assert not (tmp_path / "run").exists()


def test_tensorboard_readers_see_each_step_once_after_a_restart(tmp_path: Path) -> None:
    config = LoggingConfig(tensorboard=True, progress=False)
    write_steps(tmp_path, range(1, 6), config)
    with RunLog(tmp_path, NAMES, config, total_steps=10) as log:
        log.truncate_after(3)
        log.write(4, simple(7.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/helpful")
    assert [event.step for event in events] == [1, 2, 3, 4]
    # TensorBoard keeps float32.
    assert [event.value for event in events] == pytest.approx([0.1, 0.2, 0.3, 7.0], rel=1e-6)


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_steps(tmp_path, range(1, 11), LoggingConfig(tensorboard=False, progress=True))
    shown = capsys.readouterr().err
    assert "10/10" in shown and "helpful 1" in shown


def test_progress_text() -> None:
    text = progress_text(simple(0.25) | {"skipped": 1.0}, NAMES)
    assert text.startswith(
        "helpful 0.25 | harmless 0.25 | honest 0.25 | w 0.25/0.25/0.25 | cos 0.25/-1.00/0.00"
    )
    assert text.endswith("12 tok/s | SKIPPED")


@pytest.mark.skipif(optional.wandb().usable, reason="wandb is installed")
def test_missing_wandb_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logging\.wandb: found true.*pip install"):
        RunLog(tmp_path / "run", NAMES, LoggingConfig(wandb=True), total_steps=1)
    assert not (tmp_path / "run").exists()


class Remembers:
    """A sink that keeps how it was closed."""

    def __init__(self) -> None:
        self.closed: list[bool] = []

    def restart(self, step: int) -> None:
        pass

    def write(self, step: int, metrics: object) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        self.closed.append(failed)


@pytest.mark.parametrize("failed", [False, True])
def test_sinks_hear_whether_the_run_failed(tmp_path: Path, failed: bool) -> None:
    """A service that shows runs would else show a crash as a finished run."""
    sink = Remembers()
    log = RunLog(tmp_path, ["a"], LoggingConfig(tensorboard=False, progress=False), 1)
    log._sinks = [sink]
    try:
        with log:
            log.truncate_after(0)
            if failed:
                raise RuntimeError("out of memory")
    except RuntimeError:
        assert failed
    assert sink.closed == [failed]
