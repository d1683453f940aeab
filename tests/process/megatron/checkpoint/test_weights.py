"""Loading into, computing in, differentiating in and exporting from layouts, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gapo_mega.engine.megatron.checkpoint import convert
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama, tiny_llama3, tiny_mistral, tiny_qwen2, tiny_qwen3

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "TP2-sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2xDP2": (4, {"tensor": 2}),
    "PP2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2xPP2-interleaved": (
        4,
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True},
    ),
}
MODELS = ("llama", "llama-tied", "mistral-window")
SHALLOW = ("mistral-window",)  # too few layers for an interleaved pipeline
# The others differ in what tensor and pipeline parallelism split; one process is in the unit tests.
FAMILIES = ("llama3", "qwen2", "qwen3")
CASES = [
    *(
        (layout, model, dtype)
        for layout in LAYOUTS
        for model in MODELS
        for dtype in ("fp32", "bf16")
        if dtype == "fp32" or (model == "llama-tied" and layout in ("TP2", "PP2"))
        if "interleaved" not in layout or model not in SHALLOW
    ),
    *((layout, model, "fp32") for layout in ("TP2", "PP2", "TP2xPP2") for model in FAMILIES),
    ("TP2-sequence", "qwen3", "fp32"),
    ("PP2-interleaved", "llama-tied", "bf16"),
    ("TP2xPP2-interleaved", "qwen3", "fp32"),
    # Loaded from a checkpoint that the model was converted to, for another layout than most of these.
    *(
        (layout, model, "checkpoint")
        for layout in ("TP2", "PP2", "TP2xPP2")
        for model in (*MODELS, *FAMILIES)
    ),
    ("PP2-interleaved", "llama-tied", "checkpoint"),
    ("TP2xPP2-interleaved", "qwen3", "checkpoint"),
]
# (layout, model, whether the objectives take turns on a microbatch's graph): the norms of queries and keys
# see a part of the heads on every tensor rank, with sequence parallelism or without.
GRADIENTS = [
    ("TP2", "qwen3", False),
    ("TP2", "qwen3", True),
    ("TP2-sequence", "qwen3", False),
    ("TP2-sequence", "qwen3", True),
    ("TP2xDP2", "qwen3", True),
    ("TP2xPP2", "qwen3", False),
    ("TP2", "qwen2", False),
    ("PP2", "qwen2", False),
    ("PP2-interleaved", "qwen2", False),
    ("PP2-interleaved", "llama", False),
    ("TP2xPP2-interleaved", "qwen3", False),
]
LONG = 600  # tokens, where Llama 3's scaled frequencies matter

Case = tuple[str, str, str | bool]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    """One launch for every number of ranks."""
    folder = tmp_path_factory.mktemp("weights")
    # A vocabulary that no layout divides; a window shorter than the checked sequences.
    tiny_llama(folder / "llama", vocab=101)
    tiny_llama(folder / "llama-tied", tied=True, vocab=101)
    tiny_mistral(folder / "mistral-window", vocab=101, window=8)
    tiny_llama3(folder / "llama3", vocab=101)
    tiny_qwen2(folder / "qwen2", vocab=101)
    tiny_qwen3(folder / "qwen3", vocab=101)
    for model in (*MODELS, *FAMILIES):
        convert.to_checkpoint(folder / model, folder / f"{model}-checkpoint", tensor=2)
    found: dict[Case, dict[str, Any]] = {}
    for ranks in sorted({ranks for ranks, _ in LAYOUTS.values()}):
        cases: list[Case] = [case for case in [*CASES, *GRADIENTS] if LAYOUTS[case[0]][0] == ranks]
        jobs = [_job(folder, case) for case in cases]
        found.update(zip(cases, launch(ranks, jobs, folder), strict=True))
    return found


def _job(folder: Path, case: Case) -> tuple[str, dict[str, Any]]:
    layout, model, kind = case
    arguments = {
        "model": str(folder / model),
        "layout": LAYOUTS[layout][1],
        "export": str(folder / f"{layout}-{model}-{kind}"),
    }
    if isinstance(kind, bool):
        return "check_gradient", {**arguments, "shared": kind}
    weights, dtype = (f"{model}-checkpoint", "fp32") if kind == "checkpoint" else (model, kind)
    arguments |= {"weights": str(folder / weights), "dtype": dtype}
    return "check_weights", {**arguments, "tokens": LONG if model == "llama3" else 24}


@pytest.mark.parametrize(("layout", "model", "dtype"), CASES)
def test_logits_and_export(results: dict[Case, dict[str, Any]], layout: str, model: str, dtype: str) -> None:
    outcome = results[layout, model, dtype]
    assert "error" not in outcome, outcome["error"]
    assert outcome["result"]["different"] == []
    # fp32: summation order only, measured at 5e-7 of the greatest logit. bf16 has 8 bits, of which
    # rounding every activation of a few layers leaves an error of about 2 %.
    assert outcome["result"]["logit_error"] <= (0.06 if dtype == "bf16" else 2e-5)


@pytest.mark.parametrize(("layout", "model", "shared"), GRADIENTS)
def test_gradient_equals_that_of_transformers(
    results: dict[Case, dict[str, Any]], layout: str, model: str, shared: bool
) -> None:
    """A tensor whose gradient is summed over ranks twice, or not at all, is off by its own size."""
    outcome = results[layout, model, shared]
    assert "error" not in outcome, outcome["error"]
    errors = outcome["result"]["errors"]
    assert {name: error for name, error in errors.items() if not error <= 2e-5} == {}
    assert outcome["result"]["gram_error"] <= 1e-5
