"""Log-probabilities in chunks of positions over ranks, against one process that has all logits at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.combinations.comparison import gram_error
from tests.helpers.ranks import check_engine
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama

SGD = {"name": "sgd", "distributed": False, "lr": 0.05}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
SEPARATE, ONE_PASS = {"forward": "separate"}, {"forward": "one_pass"}
ADAM = {"name": "adam", "eps": 1e-4, "overlap_grad_reduce": True, "overlap_param_gather": True}
# layout, optimizer, gradients, chunk
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "TP2": ({"tensor": 2}, SGD, SEPARATE, 5),
    "TP2-sequence": (SEQUENCE, SGD, SEPARATE, 5),
    "TP2-sequence-one_pass": (SEQUENCE, SGD, ONE_PASS, 2),
    "PP2": ({"pipeline": 2}, SGD, SEPARATE, 5),
    "PP2-interleaved-one_pass": ({"pipeline": 2, "virtual_pipeline": 2}, SGD, ONE_PASS, 5),
    "DP2-overlap": ({}, ADAM, SEPARATE, 5),
}


def test_chunks_change_nothing_over_ranks(tmp_path: Path) -> None:
    base = tmp_path / "model"
    tiny_llama(base, tied=True)
    jobs = []
    for name, (layout, optimizer, gradients, chunk) in CASES.items():
        sections = {"gradients": gradients, "model": {"logits_chunk": chunk}}
        arguments = {"model": str(base), "layout": layout, "optimizer": optimizer, "steps": 2}
        arguments |= {"clip_epsilon": 100.0, "sections": sections, "export": str(tmp_path / name)}
        jobs.append(("check_engine", arguments))
    results = launch(2, jobs, tmp_path)
    whole = {"gradients": SEPARATE, "model": {"logits_chunk": 0}}
    alone = {**jobs[0][1], "layout": {}, "sections": whole, "export": str(tmp_path / "single")}
    single = check_engine.run(alone)
    expected = check_engine.parameters(tmp_path / "single")
    for name, outcome in zip(CASES, results, strict=True):
        assert "result" in outcome, outcome["error"]
        found = outcome["result"]
        alike = CASES[name][1] is SGD
        for step in range(2 if alike else 1):
            gram = [torch.tensor(run["gram"][step]) for run in (found, single)]
            assert gram_error(*gram) <= 1e-5, (name, step)  # fp32, sums in other orders
        tensors = check_engine.parameters(tmp_path / name)
        for key, value in expected.items() if alike else ():
            assert torch.allclose(tensors[key], value, rtol=1e-4, atol=1e-5), (name, key)
