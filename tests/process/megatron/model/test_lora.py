"""Adapters over ranks, against one process, and the files that they leave, against what PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gapo_mega.engine.megatron.checkpoint import convert
from tests.helpers import peft_models
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.logits import relative_error
from tests.helpers.ranks import check_engine
from tests.helpers.ranks.file_groups import groups_end_with_the_file as groups_end_with_the_file
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama

RATE = 0.05
SGD = {"name": "sgd", "distributed": False, "lr": RATE}
ADAM = {"name": "adam", "lr": 0.01, "eps": 1e-4}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
FULL = {"model": {"recompute": "full"}}
# layout, optimizer, gradients, other sections
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "TP2": ({"tensor": 2}, SGD, {"forward": "separate"}, {}),
    "TP2-one_pass": ({"tensor": 2}, SGD, {"forward": "one_pass"}, {}),
    "TP2-sequence": (SEQUENCE, SGD, {"forward": "separate"}, FULL),
    "TP2-sequence-one_pass": (SEQUENCE, SGD, {"forward": "one_pass"}, {}),
    "TP2-sequence-turns": (SEQUENCE, ADAM, {"forward": "shared"}, {}),
    "PP2": ({"pipeline": 2}, SGD, {"forward": "separate"}, FULL),
    "PP2-interleaved-one_pass": (
        {"pipeline": 2, "virtual_pipeline": 2},
        SGD,
        {"forward": "one_pass"},
        {},
    ),
    "DP2-gather": (
        {},
        {**ADAM, "overlap_grad_reduce": True, "overlap_param_gather": True},
        {"forward": "one_pass"},
        {},
    ),
}


def test_rows_steps_and_files_are_those_of_one_process(tmp_path: Path) -> None:
    base = tmp_path / "model"
    tiny_llama(base, tied=True)
    adapter = peft_models.random_adapter(base, tmp_path / "start")
    lora = {**peft_models.SETTINGS, "path": str(adapter)}
    jobs = []
    for name, (layout, optimizer, gradients, sections) in CASES.items():
        model = {**sections.get("model", {}), "lora": lora}
        arguments = {"model": str(base), "layout": layout, "optimizer": optimizer, "steps": 1}
        # Unclipped, one pass has one direction a sequence, which a pipeline needs.
        arguments |= {"clip_epsilon": 100.0, "sections": {"gradients": gradients, "model": model}}
        arguments |= {"export": str(tmp_path / name), "export_adapter": str(tmp_path / f"{name}-adapter")}
        arguments |= {"save": str(tmp_path / f"{name}-checkpoint"), "prompts": [[5, 6, 7], [8, 9, 10, 11]]}
        jobs.append(("check_engine", arguments))
    results = launch(2, jobs, tmp_path)
    alone = {"layout": {}, "export": str(tmp_path / "single")}
    single = check_engine.run({**jobs[0][1], **alone, "save": str(tmp_path / "single-checkpoint")})
    for (name, (_, optimizer, _, _)), found in zip(CASES.items(), results, strict=True):
        assert "result" in found, found["error"]
        found = found["result"]
        assert found["world"] == 2
        assert found["tokens"] == single["tokens"], name
        gram, expected = (torch.tensor(run["gram"][0]) for run in (found, single))
        assert gram_error(gram, expected) <= 1e-5, name  # fp32, sums in other orders
        assert abs(found["norm"][0] - found["predicted_norm"][0]) <= 1e-4 * found["norm"][0], name
        if optimizer is SGD:
            ours = check_engine.parameters(tmp_path / name)
            theirs = check_engine.parameters(tmp_path / "single")
            assert all(torch.allclose(ours[k], theirs[k], rtol=1e-5, atol=1e-6) for k in theirs), name
        convert.to_hf(tmp_path / f"{name}-checkpoint", tmp_path / f"{name}-converted")
        converted = check_engine.parameters(tmp_path / f"{name}-converted")
        model = peft_models.peft_model(base, tmp_path / f"{name}-adapter")
        merged = dict(model.merge_and_unload().named_parameters())
        for key, value in check_engine.parameters(tmp_path / name).items():
            # fp32 rounds the sum of the weight and its change.
            assert relative_error(value.double(), merged[key].detach()) <= 1e-6, (name, key)
            assert relative_error(value, converted[key]) <= 1e-6, (name, key)
