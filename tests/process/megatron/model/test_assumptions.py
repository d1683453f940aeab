"""The start's check of Megatron's groups, marks and reduction over two ranks, as they are and broken."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.helpers.ranks.launch import launch

TENSOR = {"tensor": 2, "sequence_parallel": True}
TENSOR_PLAIN = {"tensor": 2}
STAGES = {"pipeline": 2}
DATA: dict[str, Any] = {}
GATHER = {"overlap_grad_reduce": True, "overlap_param_gather": True}
PLAIN_ADAM = {"distributed": False}

SUM = "leaves the sum over 2 ranks .* found: 1 to 1 for module"
# What is broken, in which layout, and what both ranks say.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None]] = {
    "tensor": ("nothing", TENSOR, {}, None),
    "tensor-plain": ("nothing", TENSOR_PLAIN, PLAIN_ADAM, None),
    "stages": ("nothing", STAGES, {}, None),
    "data": ("nothing", DATA, {"overlap_grad_reduce": True}, None),
    "data-gather": ("nothing", DATA, GATHER, None),
    "data-plain": ("nothing", DATA, PLAIN_ADAM, None),
    # Norms under sequence parallelism, norms of queries and keys, tied embeddings over stages.
    "norms-not-summed": ("reduce_over_data_ranks_only", TENSOR, {}, SUM + r".*norm"),
    "qk-norms-not-summed": ("reduce_over_data_ranks_only", TENSOR_PLAIN, {}, SUM + r".*[qk]_layernorm"),
    "tied-not-summed": ("reduce_over_data_ranks_only", STAGES, {}, SUM + r".*(word_embeddings|output_layer)"),
    "norm-group": (
        "measure_norms_in_the_tensor_group",
        DATA,
        {},
        r"has the ranks that hold different gradients, \[0, 1\]; found: \[[01]\]",
    ),
    "norm-group-plain": (
        "measure_norms_everywhere",
        DATA,
        PLAIN_ADAM,
        r"has the ranks that hold different gradients, \[[01]\]; found: \[0, 1\]",
    ),
    "reduce-group": (
        "reduce_in_the_tensor_group",
        DATA,
        {},
        r"reduced over the data-parallel group; found: \[[01]\]",
    ),
    "shared": ("swap_the_shared_copy", STAGES, {}, "parameter.shared marks the last stage's copy"),
    "duplicates": ("split_the_norms", TENSOR, {}, "tensor_model_parallel marks .* found: True"),
    "gather-nothing": ("gather_nothing", DATA, GATHER, "gathering brings .* found: not all of module"),
    "gather-once": ("gather_once", DATA, GATHER, "gathering brings .* found: not all of module"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one launch."""
    jobs = [
        ("check_assumptions", {"breaks": breaks, "layout": layout, "optimizer": optimizer})
        for breaks, layout, optimizer, _ in CASES.values()
    ]
    return dict(zip(CASES, launch(2, jobs, tmp_path_factory.mktemp("assumptions")), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_rank_tells_what_does_not_hold(results: dict[str, dict[str, Any]], name: str) -> None:
    assert "error" not in results[name], results[name]["error"]
    expected = CASES[name][-1]
    for said in results[name]["result"]["said"]:
        assert said is None if expected is None else said is not None and re.search(expected, said), said
