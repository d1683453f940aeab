"""Models with experts in every layout of two ranks, against transformers and a single process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.combinations.comparison import gram_error
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_mixtral, tiny_qwen3_moe

TP2 = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": TP2,
    "TP2xEP2": {**TP2, "expert": 2, "expert_tensor": 1},
    "PP2": {"pipeline": 2},
}
MODELS = {"mixtral": tiny_mixtral, "qwen3_moe": tiny_qwen3_moe}
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS]
# fp32 on both sides, other orders of summation; a lost or doubled expert shows at 1e-1.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    folder = tmp_path_factory.mktemp("experts")
    for name, write in MODELS.items():
        write(folder / name)
    jobs = [
        (
            "check_gradient",
            {
                "model": str(folder / model),
                "export": str(folder / f"{model}-{layout}"),
                "layout": LAYOUTS[layout],
                "shared": layout == "TP2xEP2",
            },
        )
        for model, layout in CASES
    ]
    model, shared = str(folder / "qwen3_moe"), LAYOUTS["TP2xEP2"]
    loaded = {"folder": str(folder / "run"), "load": LAYOUTS}
    sampled = {"batch_size": 4, "eos_ids": [2], "megatron_layers": [], "runs": [{"max_new_tokens": 6}]}
    whole = {"weights": model, "export": str(folder / "whole"), "dtype": "fp32", "tokens": 20}
    jobs += [
        ("check_experts", {"model": model, "layout": shared, **loaded}),
        ("check_weights", {"model": model, "layout": shared, **whole}),
        ("check_generation", {"model": model, "layout": shared, **sampled}),
    ]
    found = launch(2, jobs, folder)
    keys = [*CASES, ("run", ""), ("weights", ""), ("generation", "")]
    return dict(zip(keys, found, strict=True))


def of(outcome: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in outcome, outcome["error"]
    found: dict[str, Any] = outcome["result"]
    return found


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_layout_has_the_gradient_of_one_process(
    results: dict[tuple[str, str], Any], model: str, layout: str
) -> None:
    found = of(results[model, layout])
    print(f"{model} {layout}: Gram error {found['gram_error']:.2e}")
    assert found["gram_error"] <= TOLERANCE
    worst = max(found["errors"], key=found["errors"].__getitem__)
    assert found["errors"][worst] <= TOLERANCE, worst


def test_the_gram_matrix_predicts_the_norm_of_megatron(results: dict[tuple[str, str], Any]) -> None:
    """Of experts and of all else together, behind every step of Adam with the distributed optimizer."""
    for measured, predicted in of(results["run", ""])["norms"]:
        assert predicted == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_shared_experts_loads_in_every_layout(
    results: dict[tuple[str, str], Any], layout: str
) -> None:
    """Weights bit by bit; the next Gram matrix to the rounding of a step that other ranks computed."""
    run = of(results["run", ""])
    found = run["layouts"][layout]
    assert found["loaded"] == []
    assert gram_error(torch.tensor(found["third"]), torch.tensor(run["grams"][2])) <= TOLERANCE


def test_logits_and_export_of_shared_experts(results: dict[tuple[str, str], Any]) -> None:
    found = of(results["weights", ""])
    assert found["different"] == []
    assert found["logit_error"] <= TOLERANCE


def test_generation_with_shared_experts_is_the_training_forward(results: dict[tuple[str, str], Any]) -> None:
    (found,) = of(results["generation", ""])["runs"]
    assert found["same"]
    assert found["logprob_error"] <= 1e-5  # log-probabilities of 5 to 6, in fp32
