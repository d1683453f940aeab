"""Critics in every kind of layout against the single process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.ranks.check_engine import COLUMNS
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama, tiny_mixtral

# Into so many tokens go the sequences of one data rank of two by threes and twos, the other's by twos.
PACKED: dict[str, Any] = {
    "micro_batch_tokens": 25,
    "data": {"source": "unused", "max_prompt_tokens": 7},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": COLUMNS - 7},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2-sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2": (2, {}),
}
OPTIMIZER = {"lr": 1e-3, "eps": 1e-4, "schedule": "constant", "warmup_fraction": 0.0}
HEADS = ("shared", "separate")
# Model, layout and other sections, with shared heads. Ranks that share experts run equally many rows.
OTHERS: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "experts": (1, "experts", {}, {}),
    "experts DP2xEP2 packed": (2, "experts", {"expert": 2}, PACKED),
    "DP2 packed": (2, "model", {}, PACKED),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """By layout and kind of heads; one launch per number of ranks."""
    folder = tmp_path_factory.mktemp("critic")
    tiny_llama(folder / "model")
    tiny_mixtral(folder / "experts")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for ranks in (1, 2):
        keys = [(name, heads) for name, (r, _) in LAYOUTS.items() if r == ranks for heads in HEADS]
        jobs = [
            (
                "check_engine",
                {
                    "model": str(folder / "model"),
                    "layout": LAYOUTS[name][1],
                    "critic": {"heads": heads, "optimizer": OPTIMIZER},
                },
            )
            for name, heads in keys
        ]
        for name, (count, model, layout, sections) in OTHERS.items():
            if count == ranks:
                keys.append((name, "shared"))
                critic = {"heads": "shared", "optimizer": OPTIMIZER}
                arguments = {"model": str(folder / model), "layout": layout, "sections": sections}
                jobs.append(("check_engine", {**arguments, "critic": critic}))
        found.update(zip(keys, launch(ranks, jobs, folder), strict=True))
    return found


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_losses_and_values(results: dict[tuple[str, str], dict[str, Any]], layout: str, heads: str) -> None:
    check(results[layout, heads], results["single", heads])


@pytest.mark.parametrize(
    ("name", "single"), [("experts DP2xEP2 packed", "experts"), ("DP2 packed", "single")]
)
def test_packed_rows(results: dict[tuple[str, str], dict[str, Any]], name: str, single: str) -> None:
    check(results[name, "shared"], results[single, "shared"])


def check(mine: dict[str, Any], single: dict[str, Any]) -> None:
    """Three Adam updates apart, the fp32 differences stay far below 1e-3 of the numbers."""
    assert "error" not in mine, mine["error"]
    assert "error" not in single, single["error"]
    for key in ("losses", "values"):
        found, expected = torch.tensor(mine["result"][key]), torch.tensor(single["result"][key])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    losses = torch.tensor(single["result"]["losses"])
    assert bool((losses[-1] < losses[0]).all()), "the critic learns"
