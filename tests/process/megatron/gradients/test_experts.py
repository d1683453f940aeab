"""Gradients of models with experts in every layout of two ranks, against transformers and autograd."""

from __future__ import annotations

from typing import Any

import pytest

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
    return dict(zip(CASES, launch(2, jobs, folder), strict=True))


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
