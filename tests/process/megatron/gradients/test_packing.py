"""Packed rows in layouts of two ranks, against unpacked rows in a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.combinations.comparison import gram_error
from tests.helpers.ranks.check_engine import COLUMNS
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama, tiny_mixtral

SGD = {"name": "sgd", "distributed": False, "lr": 0.05}
ADAM = {"name": "adam", "lr": 0.01, "eps": 1e-4}
SIZES: dict[str, Any] = {
    "data": {"source": "unused", "max_prompt_tokens": 7},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": COLUMNS - 7},
}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
ONE_PASS, TURNS, SEPARATE = ({"forward": kind} for kind in ("one_pass", "shared", "separate"))
LORA = {"model": {"lora": {"rank": 3}}}
OVERLAP = {**ADAM, "overlap_grad_reduce": True, "overlap_param_gather": True}
# Into so many tokens go the sequences of one data rank of two by threes and twos, the other's by twos.
TOKENS = 25
# By name: model, layout, optimizer, gradients, other sections.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "TP2 one pass": ("llama", {"tensor": 2}, SGD, ONE_PASS, {}),
    "TP2 sequence one pass chunks": ("llama", SEQUENCE, SGD, ONE_PASS, {"model": {"logits_chunk": 4}}),
    "TP2 sequence last layer": ("llama", SEQUENCE, SGD, {**SEPARATE, "scope": "last_layer"}, {}),
    "PP2": ("llama", {"pipeline": 2}, SGD, SEPARATE, {}),
    "PP2 one pass": ("llama", {"pipeline": 2}, SGD, ONE_PASS, {}),
    "PP2 interleaved one pass": ("llama", {"pipeline": 2, "virtual_pipeline": 2}, SGD, ONE_PASS, {}),
    "TP2 sequence one pass adapters": ("llama", SEQUENCE, SGD, ONE_PASS, LORA),
    "PP2 interleaved": ("llama", {"pipeline": 2, "virtual_pipeline": 2}, SGD, SEPARATE, {}),
    "DP2 turns": ("llama", {}, SGD, TURNS, {}),
    "DP2 one pass overlap": ("llama", {}, OVERLAP, ONE_PASS, {}),
    "DP2 tight": ("llama", {}, ADAM, SEPARATE, {"micro_batch_tokens": COLUMNS}),
    "TP2xEP2": ("mixtral", {**SEQUENCE, "expert": 2, "expert_tensor": 1}, SGD, SEPARATE, {}),
    # The ranks exchange tokens in every layer, and one has fewer rows than the other.
    "DP2xEP2": ("mixtral", {"expert": 2}, SGD, SEPARATE, {}),
    "DP2xEP2 one pass": ("mixtral", {"expert": 2}, SGD, ONE_PASS, {}),
}
STEPS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("packing")
    tiny_llama(folder / "llama", tied=True)
    tiny_mixtral(folder / "mixtral")
    packed = {name: _job(folder, name, *case, tokens=TOKENS) for name, case in CASES.items()}
    single = {
        _reference(name): _job(
            folder,
            _reference(name),
            model,
            {},
            optimizer,
            {**gradients, **SEPARATE},
            LORA if sections is LORA else {},
        )
        for name, (model, _, optimizer, gradients, sections) in CASES.items()
    }
    found = {}
    for ranks, jobs in ((1, single), (2, packed)):
        outcomes = launch(ranks, [("check_engine", job) for job in jobs.values()], folder)
        found |= dict(zip(jobs, outcomes, strict=True))
    return found


def _reference(name: str) -> str:
    """The same model, optimizer and scope."""
    model, _, optimizer, gradients, sections = CASES[name]
    adapters = "adapters" if sections is LORA else "whole"
    return f"{model} {optimizer['name']} {gradients.get('scope', 'full')} {adapters}"


def _job(
    folder: Path,
    name: str,
    model: str,
    layout: dict[str, Any],
    optimizer: dict[str, Any],
    gradients: dict[str, Any],
    sections: dict[str, Any],
    tokens: int | None = None,
) -> dict[str, Any]:
    packing = {} if tokens is None else {"micro_batch_tokens": tokens}
    return {
        "model": str(folder / model),
        "layout": layout,
        "optimizer": optimizer,
        "sections": {**SIZES, **packing, "gradients": gradients, **sections},
        "clip_epsilon": 100.0,  # so that a pipeline's one pass is enough
        "steps": STEPS,
        "export": str(folder / name),
    }


@pytest.mark.parametrize("name", CASES)
def test_as_unpacked_in_one_process(results: dict[str, dict[str, Any]], name: str) -> None:
    """fp32 sums in another order; after a step Adam lets parameters differ by up to 1e-3 of the update."""
    outcome, reference = results[name], results[_reference(name)]
    assert "error" not in outcome, outcome["error"]
    found, expected = outcome["result"], reference["result"]
    assert found["world"] == 2
    for step in range(STEPS):
        first = step == 0 or CASES[name][2]["name"] == "sgd"
        gram, other = (torch.tensor(result["gram"][step]).double() for result in (found, expected))
        assert gram_error(gram, other) <= (1e-5 if first else 1e-3)
        loss_error = 1e-5 if first else 1e-3
        assert found["losses"][step] == pytest.approx(
            expected["losses"][step], rel=loss_error, abs=loss_error
        )
    if "scope" not in CASES[name][3]:
        assert found["predicted_norm"] == pytest.approx(found["norm"], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "one pass" in name])
def test_one_pass_was_all_it_took(results: dict[str, dict[str, Any]], name: str) -> None:
    for phases in results[name]["result"]["phases"]:
        assert not any(phase.startswith("forward_backward/") for phase in phases)
