"""Two instances of the distributed optimizer on four ranks, against a single process and from checkpoints."""

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
from tests.helpers.tiny import tiny_llama, tiny_mixtral

pytest.importorskip("einops")

ADAM = {"name": "adam", "lr": 0.01, "eps": 1e-4}
TWO = {"distributed_optimizer_instances": 2}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
SEPARATE, TURNS, ONE_PASS = ({"forward": kind} for kind in ("separate", "shared", "one_pass"))
# By name: model, layout, gradients, other sections. With two model ranks each instance has one data rank.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "DP4": ("llama", {}, SEPARATE, {}),
    "DP4 one pass": ("llama", {}, ONE_PASS, {}),
    "DP4 turns": ("llama", {}, TURNS, {"micro_batch_size": 1}),
    "DP4 last block": ("llama", {}, {**SEPARATE, "scope": "last_block"}, {}),
    "TP2xDP2": ("llama", SEQUENCE, ONE_PASS, {}),
    "PP2xDP2": ("llama", {"pipeline": 2}, SEPARATE, {}),
    "TP2xEP2xDP2": ("mixtral", {**SEQUENCE, "expert": 2, "expert_tensor": 1}, ONE_PASS, {}),
}
AVERAGED = {"optimizer": {"lr": 1e-3}, "sections": {"gradients": SEPARATE}}
STEPS = 2


def _reference(name: str) -> str:
    model, _, gradients, _ = CASES[name]
    return f"{model} {gradients.get('scope', 'full')}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("instances")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The one launch of four ranks saves a checkpoint, which single processes load."""
    tiny_llama(folder / "llama", tied=True)
    tiny_mixtral(folder / "mixtral")

    def job(name: str, case: tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]) -> tuple[str, Any]:
        model, layout, gradients, sections = case
        return "check_engine", {
            "model": str(folder / model),
            "layout": layout,
            "optimizer": ADAM,
            "sections": {"gradients": gradients, **sections},
            "clip_epsilon": 100.0,
            "steps": STEPS,
            "export": str(folder / name),
        }

    averaged = {"model": str(folder / "llama"), **AVERAGED}
    saving = {"layout": TWO, "export": str(folder / "averages" / "models"), "save": str(folder / "saved")}
    loading = {"layout": {}, "load": str(folder / "saved")}
    four = {
        name: job(name, (model, {**layout, **TWO}, *rest)) for name, (model, layout, *rest) in CASES.items()
    }
    four["saving"] = ("check_averages", {**averaged, **saving})
    one = {}
    for name, (model, _, gradients, _) in CASES.items():
        one[_reference(name)] = job(_reference(name), (model, {}, {**gradients, **SEPARATE}, {}))
    one["loading"] = ("check_averages", {**averaged, **loading})
    found = {}
    for ranks, jobs in ((4, four), (1, one)):
        found |= dict(zip(jobs, launch(ranks, list(jobs.values()), folder), strict=True))
    return found


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(results: dict[str, dict[str, Any]], folder: Path, name: str) -> None:
    """fp32 sums in another order; after a step Adam lets parameters differ by up to 1e-3 of the update."""
    found, expected = result(results, name), result(results, _reference(name))
    assert found["world"] == 4
    for step, tolerance in enumerate((1e-5, 1e-3)):
        gram, other = (torch.tensor(r["gram"][step]).double() for r in (found, expected))
        assert gram_error(gram, other) <= tolerance
        assert found["losses"][step] == pytest.approx(expected["losses"][step], rel=tolerance, abs=tolerance)
    if "scope" not in CASES[name][2]:
        assert found["predicted_norm"] == pytest.approx(found["norm"], rel=1e-5)
    start = parameters(folder / CASES[name][0])
    mine, single = parameters(folder / name), parameters(folder / _reference(name))
    difference = sum(float((mine[k] - single[k]).double().square().sum()) for k in single) ** 0.5
    update = sum(float((single[k] - start[k]).double().square().sum()) for k in single) ** 0.5
    assert difference <= 1e-3 * update


def test_running_means_against_float64(results: dict[str, dict[str, Any]], folder: Path) -> None:
    assert_as_reference(result(results, "saving"), folder / "averages" / "models", 1e-5)


def test_a_single_process_goes_on_from_their_checkpoint(results: dict[str, dict[str, Any]]) -> None:
    """Sums in another order; after the first update Adam divides by small numbers."""
    found, expected = result(results, "loading"), result(results, "saving")
    for step, tolerance in enumerate((2e-5, 2e-3)):
        mine, single = found["weights"][step], expected["weights"][check_averages.SAVED + step]
        assert mine == pytest.approx(single, rel=tolerance)
