"""Context parallelism against a single process: gradients, critics, answers, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.averages import assert_as_reference
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.ranks import check_averages
from tests.helpers.ranks.check_engine import parameters
from tests.helpers.ranks.launch import launch, result
from tests.helpers.tiny import tiny_llama, tiny_mistral, tiny_qwen3

ADAM = {"name": "adam", "lr": 0.01, "eps": 1e-4}
SEPARATE, TURNS, ONE_PASS = ({"forward": kind} for kind in ("separate", "shared", "one_pass"))
Case = tuple[int, str, dict[str, Any], dict[str, Any], dict[str, Any]]
# By name: ranks, model, layout beside context, gradients, other sections.
CASES: dict[str, Case] = {
    "separate": (2, "llama", {}, SEPARATE, {}),
    "one pass": (2, "llama", {}, ONE_PASS, {}),
    "turns": (2, "llama", {}, TURNS, {"micro_batch_size": 8}),
    "last layer": (2, "llama", {}, {**SEPARATE, "scope": "last_layer"}, {}),
    "last block": (2, "llama", {}, {**SEPARATE, "scope": "last_block"}, {}),
    "a layer": (2, "llama", {}, {**SEPARATE, "scope": [[1, 2]]}, {}),
    "recomputed": (2, "llama", {}, ONE_PASS, {"model": {"recompute": "full"}}),
    "in chunks": (2, "llama", {}, ONE_PASS, {"model": {"logits_chunk": 6}}),
    "whole buckets": (2, "llama", {}, SEPARATE, {"optimizer": {**ADAM, "distributed": False}}),
    "norms of heads": (2, "qwen3", {}, ONE_PASS, {}),
    "window": (2, "mistral", {}, SEPARATE, {}),
    "CP4": (4, "llama", {}, ONE_PASS, {}),
    "DP2": (4, "llama", {}, ONE_PASS, {}),
    "TP2": (4, "llama", {"tensor": 2, "sequence_parallel": True}, ONE_PASS, {}),
    "PP2": (4, "llama", {"pipeline": 2}, ONE_PASS, {}),
}
AVERAGED = {"optimizer": {"lr": 1e-3}, "sections": {"gradients": SEPARATE}}
RATE = {"lr": 1e-3, "eps": 1e-4, "schedule": "constant", "warmup_fraction": 0.0}
CRITIC = {"critic": {"heads": "shared", "optimizer": RATE}}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [11, 12]]
STEPS = 2


def _reference(name: str) -> str:
    _, model, _, gradients, _ = CASES[name]
    return f"{model} {gradients.get('scope', 'full')}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """One launch of each number of ranks."""
    tiny_llama(folder / "llama", tied=True)
    tiny_qwen3(folder / "qwen3")
    tiny_mistral(folder / "mistral", window=16)
    jobs: dict[int, dict[str, Any]] = {4: {}, 2: {}, 1: {}}

    def add(ranks: int, name: str, model: str, layout: dict[str, Any], sections: dict[str, Any]) -> None:
        sections = dict(sections)
        jobs[ranks][name] = (
            "check_engine",
            {
                "model": str(folder / model),
                "layout": layout,
                "optimizer": sections.pop("optimizer", ADAM),
                "sections": sections,
                "clip_epsilon": 100.0,
                "steps": STEPS,
                "prompts": PROMPTS,
                "export": str(folder / name),
            },
        )

    for name, (ranks, model, layout, gradients, sections) in CASES.items():
        context = 4 if name == "CP4" else 2
        add(ranks, name, model, {**layout, "context": context}, {"gradients": gradients, **sections})
        add(1, _reference(name), model, {}, {"gradients": {**gradients, **SEPARATE}})
    averaged = {"model": str(folder / "llama"), **AVERAGED}
    saving = {"layout": {"context": 2}, "export": str(folder / "averages"), "save": str(folder / "saved")}
    loading = {"layout": {}, "load": str(folder / "saved")}
    jobs[2]["saving"] = ("check_averages", {**averaged, **saving})
    jobs[1]["loading"] = ("check_averages", {**averaged, **loading})
    critic = {"model": str(folder / "llama"), **CRITIC}
    jobs[2]["critic"] = ("check_engine", {**critic, "layout": {"context": 2}})
    jobs[1]["critic of one"] = ("check_engine", {**critic, "layout": {}})
    found = {}
    for ranks, own in jobs.items():
        found |= dict(zip(own, launch(ranks, list(own.values()), folder), strict=True))
    return found


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(results: dict[str, dict[str, Any]], folder: Path, name: str) -> None:
    """fp32 sums in another order; after a step Adam lets parameters differ by up to 1e-3 of the update."""
    found, expected = result(results, name), result(results, _reference(name))
    assert found["world"] == CASES[name][0]
    assert found["tokens"] == expected["tokens"]
    for step, tolerance in enumerate((1e-5, 1e-3)):
        gram, other = (torch.tensor(r["gram"][step]).double() for r in (found, expected))
        assert gram_error(gram, other) <= tolerance
        assert found["losses"][step] == pytest.approx(expected["losses"][step], rel=tolerance, abs=tolerance)
    if "scope" not in CASES[name][3]:
        assert found["predicted_norm"] == pytest.approx(found["norm"], rel=1e-5)
    start = parameters(folder / CASES[name][1])
    mine, single = parameters(folder / name), parameters(folder / _reference(name))
    difference = sum(float((mine[k] - single[k]).double().square().sum()) for k in single) ** 0.5
    update = sum(float((single[k] - start[k]).double().square().sum()) for k in single) ** 0.5
    assert difference <= 1e-3 * update


def test_a_critic_as_in_one_process(results: dict[str, dict[str, Any]]) -> None:
    found, expected = result(results, "critic"), result(results, "critic of one")
    for key in ("losses", "values"):
        mine, single = torch.tensor(found[key]), torch.tensor(expected[key])
        torch.testing.assert_close(mine, single, rtol=1e-3, atol=1e-3 * float(single.abs().max()))


def test_running_means_against_float64(results: dict[str, dict[str, Any]], folder: Path) -> None:
    assert_as_reference(result(results, "saving"), folder / "averages", 1e-5)


def test_a_single_process_goes_on_from_their_checkpoint(results: dict[str, dict[str, Any]]) -> None:
    """Sums in another order; after the first update Adam divides by small numbers."""
    found, expected = result(results, "loading"), result(results, "saving")
    for step, tolerance in enumerate((2e-5, 2e-3)):
        mine, single = found["weights"][step], expected["weights"][check_averages.SAVED + step]
        assert mine == pytest.approx(single, rel=tolerance)
