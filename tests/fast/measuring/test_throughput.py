"""What the log of a run says of its speed, with responses of the trained weights and of a server."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gapo_mega.measuring import throughput
from gapo_mega.planning.speed import Lengths, flops_of
from gapo_mega.rollout.backends.megatron import Megatron
from gapo_mega.rollout.backends.vllm import Vllm
from tests.helpers.fake_runs import trainer
from tests.helpers.metrics_log import metrics
from tests.helpers.table_policy import TablePolicy
from tests.helpers.vllm_protocol import table_server


def measured(directory: Path, url: str | None) -> tuple[dict[str, Any], Any]:
    """Of a run of two timed steps; the FLOPs that all of its parts have."""
    vllm = {"url": url, "start_timeout": 5}
    own: dict[str, Any] = {} if url is None else {"rollout": {"backend": "vllm", "vllm": vllm}}
    backend = Megatron if url is None else Vllm
    run = trainer(directory, TablePolicy(), steps=3, held_out=[], backend=backend, **own)
    assert run.run()
    found = throughput.measure(run.resolved)
    prompt, response = (
        round(statistics.mean(line[f"{name}_length"] for line in metrics(directory)[1:]))
        for name in ("prompt", "response")
    )
    return found, flops_of(run.resolved, Lengths(prompt, max(1, response)))


def test_rollouts_count_where_they_take_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_peak", lambda dtype: (1e9, "given"))
    own, flops = measured(tmp_path / "own", None)
    assert own["model_flops_per_step"] == flops.model and "weights_bytes_per_step" not in own
    assert own["formula"] == throughput.FORMULA
    with table_server() as server:
        served, flops = measured(tmp_path / "served", server.url)
    assert served["model_flops_per_step"] == flops.model - flops.rollout
    lines = metrics(tmp_path / "served", ())[1:]
    for name in ("seconds", "bytes"):
        wanted = statistics.median(line[f"weights/{name}"] for line in lines)
        assert served[f"weights_{name}_per_step"] == wanted > 0
    text = io.StringIO()
    throughput.print_table(served, Console(file=text, width=200))
    assert "weights to servers, a step: 1.6 MB in" in text.getvalue()
    assert "the FLOPs of rollouts are left out" in text.getvalue()
