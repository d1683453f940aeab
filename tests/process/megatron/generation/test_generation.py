"""Generation over tensor and pipeline ranks gives the tokens of a single process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama

TOKENS = 14
RUNS = [
    {"max_new_tokens": TOKENS, "temperature": 0.0, "repetition_penalty": 1.3},
    {"max_new_tokens": TOKENS},
    {"max_new_tokens": TOKENS, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1},
]
MODELS: dict[str, dict[str, Any]] = {"tied": {"tied": True}, "three_groups": {"heads": 6, "groups": 3}}
# (model, ranks, layout, rows at once)
CASES: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "TP2": ("tied", 2, {"tensor": 2}, 4),
    "PP2": ("tied", 2, {"pipeline": 2}, 4),
    "PP2-one-row-at-once": ("tied", 2, {"pipeline": 2}, 1),
    "TP2-sequence-parallel": ("tied", 2, {"tensor": 2, "sequence_parallel": True}, 7),
    "TP3": ("three_groups", 3, {"tensor": 3}, 7),
    "TP2xPP2": ("tied", 4, {"tensor": 2, "pipeline": 2}, 5),
    "PP2xDP2": ("tied", 4, {"pipeline": 2}, 7),
    "PP2-interleaved": ("tied", 2, {"pipeline": 2, "virtual_pipeline": 2}, 4),
    "PP2-interleaved-one-row-at-once": ("tied", 2, {"pipeline": 2, "virtual_pipeline": 2}, 1),
    "TP2xPP2-interleaved": (
        "tied",
        4,
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True},
        5,
    ),
    "CP2": ("tied", 2, {"context": 2}, 4),
    "PP2xCP2-one-row-at-once": ("tied", 4, {"pipeline": 2, "context": 2}, 1),
    "PP4": ("tied", 4, {"pipeline": 4}, 7),
    "TP2xPP2-megatron-layers": ("tied", 4, {"tensor": 2, "pipeline": 2}, 5),
    "PP2-interleaved-megatron-layers": ("tied", 2, {"pipeline": 2, "virtual_pipeline": 2}, 4),
    "PP2-megatron-layers-on-one-stage": ("tied", 2, {"pipeline": 2}, 4),
    "single-tied": ("tied", 1, {}, 7),
    "single-three_groups": ("three_groups", 1, {}, 3),
}
# Pipeline stages whose layers our decoder is not to know.
MEGATRON_LAYERS = {
    "TP2xPP2-megatron-layers": [0, 1],
    "PP2-interleaved-megatron-layers": [0, 1],
    "PP2-megatron-layers-on-one-stage": [1],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """All runs of every case; one launch per number of ranks."""
    folder = tmp_path_factory.mktemp("generation")
    for name, options in MODELS.items():
        tiny_llama(folder / name, **options)
    found: dict[str, list[dict[str, Any]]] = {}
    for ranks in (1, 2, 3, 4):
        cases = {name: case for name, case in CASES.items() if case[1] == ranks}
        jobs = [
            (
                "check_generation",
                # Every tenth token ends a response, so that rows leave at different times.
                {
                    "model": str(folder / model),
                    "layout": layout,
                    "batch_size": rows,
                    "eos_ids": list(range(5, 200, 10)),
                    "runs": RUNS,
                    "megatron_layers": MEGATRON_LAYERS.get(name, []),
                },
            )
            for name, (model, _, layout, rows) in cases.items()
        ]
        for name, result in zip(cases, launch(ranks, jobs, folder), strict=True):
            assert "error" not in result, f"{name}: {result['error']}"
            found[name] = result["result"]["runs"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_those_of_a_single_process(results: dict[str, list[dict[str, Any]]], case: str) -> None:
    for run, expected in zip(results[case], results[f"single-{CASES[case][0]}"], strict=True):
        assert run["tokens"] == expected["tokens"]
        assert run["mask"] == expected["mask"]
        assert run["finished"] == expected["finished"]
        assert any(run["finished"])
        # fp32 sums in another order; log-probabilities are up to 10 in size.
        torch.testing.assert_close(
            torch.tensor(run["logprobs"]), torch.tensor(expected["logprobs"]), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_the_result(results: dict[str, list[dict[str, Any]]], case: str) -> None:
    assert all(run["same"] for run in results[case])


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_training_forward(
    results: dict[str, list[dict[str, Any]]], case: str
) -> None:
    # fp32 with and without cache, left against right padding.
    assert all(run["logprob_error"] < 1e-4 for run in results[case])


def test_the_runs_differ(results: dict[str, list[dict[str, Any]]]) -> None:
    greedy, plain, cut = (run["tokens"] for run in results["single-tied"])
    assert greedy != plain and plain != cut and greedy != cut
