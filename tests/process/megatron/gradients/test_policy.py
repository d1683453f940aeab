"""Normalizations, entropy and what is measured of the policy in every layout, against the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import check_policy
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama

SEPARATE, ONE_PASS = {"forward": "separate"}, {"forward": "one_pass"}
DP, TP2, PP2 = {}, {"tensor": 2}, {"pipeline": 2}
VPP2 = {"pipeline": 2, "virtual_pipeline": 2}
# Name: ranks, layout, normalization, entropy_beta, whether entropy is logged, gradients
CASES: dict[str, tuple[int, dict[str, int], str, float, bool, dict[str, Any]]] = {
    "DP2 tokens": (2, DP, "token_mean", 0.02, False, ONE_PASS),
    "DP2 sequences": (2, DP, "sequence_mean", 0.02, False, ONE_PASS),
    "DP2 length": (2, DP, "fixed_length", 0.0, False, SEPARATE),
    "DP2 one rank without a token": (2, DP, "sequence_mean", 0.02, False, ONE_PASS),
    "TP2 tokens": (2, TP2, "token_mean", 0.02, False, ONE_PASS),
    "TP2 entropy logged": (2, TP2, "sequence_mean", 0.0, True, SEPARATE),
    "PP2 one pass": (2, PP2, "sequence_mean", 0.02, False, ONE_PASS),
    "PP2 separate": (2, PP2, "fixed_length", 0.02, False, SEPARATE),
    "VPP2 last layer": (2, VPP2, "token_mean", 0.0, True, {"scope": "last_layer", **SEPARATE}),
}
DROPPED = {"DP2 one rank without a token": [0, 1, 2, 3, 6]}  # rows without a response


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama(folder / "model")
    jobs = [
        (
            "check_policy",
            {
                "model": str(folder / "model"),
                "layout": layout,
                "normalization": normalization,
                "entropy_beta": beta,
                "entropy": logged,
                "dropped": DROPPED.get(name, []),
                "sections": {"gradients": gradients},
            },
        )
        for name, (_, layout, normalization, beta, logged, gradients) in CASES.items()
    ]
    return folder / "model", dict(zip(CASES, launch(2, jobs, folder), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_that_of_the_whole_batch(results: tuple[Path, dict[str, Any]], name: str) -> None:
    model, found = results
    assert "error" not in found[name], found[name]["error"]
    _, _, normalization, beta, logged, gradients = CASES[name]
    worst = check_policy.differences(found[name]["result"], check_policy.expected(model, normalization, beta))
    if "scope" in gradients:
        del worst["gram"]  # of the scope only
    # fp32 through four layers against float64; shares of tokens are counts.
    assert max(worst.values()) <= 1e-5, worst
    assert worst["clipped"] <= 1e-12 and ("entropy" in worst) == (logged or beta > 0)
