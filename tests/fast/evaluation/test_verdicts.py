"""Verdicts beyond the paper's methods: on a scalarizer, and on methods that have to be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from gapo_mega import aggregation
from gapo_mega.aggregation import safe_weights
from gapo_mega.config import Config
from gapo_mega.config.loading import dump
from gapo_mega.engine.base import GradientReport
from gapo_mega.evaluation.audit import audit_run, run_audit
from gapo_mega.runs.log import JsonLines
from gapo_mega.runs.metrics import step_metrics
from tests.helpers.audited_runs import random_grams, write_run

# Norms and cosines give the Gram matrix back to a few units in the last place, the solver adds a few more.
ROUND_TRIP = 1e-9


def test_a_scalarizer_is_judged_at_its_audited_steps(tmp_path: Path) -> None:
    """By its own gradient, the last row of a Gram matrix; the methods by the objectives' part of it."""
    names = ["helpful", "harmless"]
    config = Config(
        output_dir=str(tmp_path),
        model={"path": "a/model"},  # type: ignore[arg-type]
        data={"source": "prompts.jsonl"},  # type: ignore[arg-type]
        objectives=[{"name": name, "function": "m:f"} for name in names],  # type: ignore[list-item]
        scalarization={"name": "gdpo"},  # type: ignore[arg-type]
        gradients={"audit_every": 2},  # type: ignore[arg-type]
    )
    dump(config, tmp_path / "config.yaml")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    facts: dict[str, Any] = {"kl": 0.0, "tokens_per_second": 1.0, "peak_memory_bytes": 1, "seconds": {}}
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.restart(0)
    for step, g in enumerate(rows, start=1):
        own = [*names, "gdpo"] if step % 2 == 0 else ["gdpo"]
        gram = (g @ g.T)[-len(own) :, -len(own) :]
        weights = torch.eye(3, dtype=torch.float64)[-1][-len(own) :]
        report = GradientReport([0.0] * len(own), gram, weights, 1.0, 1.0, 1e-6)
        log.write(step, step_metrics(report, names, rows=own, rewards=[0.0] * 2, **facts))
    log.close()
    audit = audit_run(tmp_path)
    assert audit.recording.steps == [2, 4] and audit.recording.names == names
    scalarizer, *methods = audit.verdicts
    audited = rows[1::2]
    expected = torch.nn.functional.cosine_similarity(audited[:, :2], audited[:, 2:], dim=2).numpy()
    np.testing.assert_allclose(scalarizer.cosines, expected, rtol=ROUND_TRIP)
    assert (scalarizer.hurt == (expected < 0)).all() and scalarizer.hurt.any()
    assert np.isnan(scalarizer.weights).all()
    asked = {name for name, method in aggregation.methods().items() if method.in_every_audit}
    assert {v.candidate.aggregator.name for v in methods} >= asked >= {"gapo", "mgda", "p_gapo"}
    gapo = next(v for v in methods if v.candidate.label == "gapo p=1")
    weights = aggregation.build("gapo")(audited[0, :2] @ audited[0, :2].T)
    np.testing.assert_allclose(gapo.weights[0], weights.numpy(), rtol=ROUND_TRIP)
    run_audit(tmp_path, out=tmp_path / "audit", console=Console(width=120))
    assert (tmp_path / "audit" / "audit.png").exists()
    only = audit_run(tmp_path, ["gdpo"])
    assert [v.candidate.label for v in only.verdicts] == ["gdpo"]


def test_every_method_is_asked_where_it_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, random_grams(3))
    names = sorted(aggregation.methods())
    audit = audit_run(run, names)
    assert sorted({v.candidate.aggregator.name for v in audit.verdicts}) == names
    upgrad = next(v for v in audit.verdicts if v.candidate.aggregator.name == "upgrad")
    assert not upgrad.hurt.any() and audit.warning is None


def test_a_method_that_looks_at_scores_is_told_to_be_asked_without_them(tmp_path: Path) -> None:
    """Its weights differ from the log's, which nobody has edited."""
    method = {"name": "gapo", "options": {"rates": "adaptive"}}
    audit = audit_run(write_run(tmp_path, random_grams(2), method))
    assert audit.warning is not None and audit.warning.startswith(
        "gapo p=1 rates=adaptive also looks at scores"
    )
    assert audit.verdicts[0].candidate.note == "this run"


def test_a_safe_scalarizer_is_asked_again_from_the_weights_in_the_log(tmp_path: Path) -> None:
    """To the log's last digits; one step was skipped, in one a gradient was zero."""
    grams = random_grams(3)
    given = torch.rand(len(grams), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    safe = {"name": "ctwa", "options": {"safe": True}}
    run = write_run(tmp_path, grams, {"name": "gapo", "options": {}}, scalarization=safe)
    names = ["helpful", "harmless", "honest"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, gram, start in zip(lines, grams, given, strict=True):
        weights = torch.zeros(3)
        if bool(gram.isfinite().all()):
            weights = safe_weights(gram, torch.where(gram.diagonal() > 0, start, 0.0))
        for name, weight, number in zip(names, weights.tolist(), start.tolist(), strict=True):
            line |= {f"weight/{name}": weight, f"reward_weight/{name}": number}
    write = (run / "metrics.jsonl").write_text
    write("".join(json.dumps(line) + "\n" for line in lines))
    audit = audit_run(run)
    own = audit.verdicts[0]
    assert own.candidate.label == "ctwa safe=True" and audit.warning is None
    assert not own.hurt.any() and {v.candidate.aggregator.name for v in audit.verdicts[1:]} >= {
        "gapo",
        "mgda",
    }
    np.testing.assert_allclose(own.weights, audit.recording.weights, rtol=ROUND_TRIP)
    assert [v.candidate.label for v in audit_run(run, ["ctwa"]).verdicts] == ["ctwa safe=True"]
    lines[3]["reward_weight/helpful"] *= 1.01
    write("".join(json.dumps(line) + "\n" for line in lines))
    warning = audit_run(run).warning
    assert (
        warning is not None and "at 1 of 7 steps the logged weights are not those of ctwa safe=T" in warning
    )
    del lines[3]["reward_weight/helpful"]
    write("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"step 4 has no 'reward_weight/helpful'"):
        audit_run(run)
