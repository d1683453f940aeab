"""Models with experts in layouts of two and four ranks, against transformers and a single process.

``-s`` shows the errors that docs/layouts.md has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.combinations.comparison import gram_error
from tests.helpers.ranks.check_engine import COLUMNS, parameters
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_mixtral, tiny_qwen3_moe

TP2 = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": TP2,
    "TP2xEP2": {**TP2, "expert": 2, "expert_tensor": 1},
    "PP2": {"pipeline": 2},
    "DP2xEP2": {"expert": 2},
}
MODELS = {"mixtral": tiny_mixtral, "qwen3_moe": tiny_qwen3_moe}
CASES = [(model, layout) for model in MODELS for layout in LAYOUTS]
FOUR: dict[str, dict[str, Any]] = {
    "PP2xDP2xEP2": {"pipeline": 2, "expert": 2},
    "TP2xPP2xEP2": {**TP2, "pipeline": 2, "expert": 2, "expert_tensor": 1},
    "TP2xDP2xEP2 split": {**TP2, "expert": 2},
    "TP2xDP2xEP4": {**TP2, "expert": 4, "expert_tensor": 1},
    "DP4xEP2": {"expert": 2},
}
# The tiny qwen3_moe has six experts.
FOUR_CASES = [(m, layout) for m in MODELS for layout in FOUR if (m, layout) != ("qwen3_moe", "TP2xDP2xEP4")]
# Where experts are shared, and where their checkpoints are loaded.
SHARING = {"TP2xEP2": tuple(LAYOUTS), "DP2xEP2": ("DP2", "TP2xEP2", "DP2xEP2")}
ENDING = [{"max_new_tokens": 16}, {"max_new_tokens": 9, "top_k": 50}]
PACKED: dict[str, Any] = {
    "micro_batch_tokens": 25,
    "data": {"source": "unused", "max_prompt_tokens": 7},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": COLUMNS - 7},
}
ADAPTERS = {"model": {"lora": {"rank": 3, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}}}
RECOMPUTED = {"model": {"recompute": "full"}}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
# One pass against separate passes in the same layout. By name: ranks, model, layout, sections, losses.
ONE_PASS: dict[str, tuple[int, str, dict[str, Any], dict[str, Any], list[str]]] = {
    "PP2": (2, "qwen3_moe", LAYOUTS["PP2"], {}, ["unclipped"]),
    "PP2 interleaved packed": (2, "mixtral", INTERLEAVED, PACKED, ["unclipped"]),
    "TP2xEP2 packed": (2, "mixtral", LAYOUTS["TP2xEP2"], PACKED, ["clipped"]),
    "DP2xEP2 packed": (2, "mixtral", LAYOUTS["DP2xEP2"], PACKED, ["clipped"]),
    "DP2xEP2 recomputed": (2, "qwen3_moe", LAYOUTS["DP2xEP2"], RECOMPUTED, ["clipped", "by_token"]),
    "TP2xDP2xEP4": (4, "mixtral", FOUR["TP2xDP2xEP4"], {}, ["clipped"]),
    "PP2xDP2xEP2 recomputed": (4, "qwen3_moe", FOUR["PP2xDP2xEP2"], RECOMPUTED, ["unclipped"]),
}
FACTORS = {"router_aux_loss": 0.3, "router_z_loss": 0.01}
# By name: layout and sections of two steps, each compared with one process, whose rows are not packed.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"routers {name}": (layout, {"model": FACTORS}) for name, layout in LAYOUTS.items()},
    **{f"routers {name} packed": (LAYOUTS[name], {"model": FACTORS, **PACKED}) for name in SHARING},
    **{f"adapters {name}": (LAYOUTS[name], ADAPTERS) for name in SHARING},
}
ALONE = {"routers": {"model": FACTORS}, "adapters": ADAPTERS}
# fp32 against float64; a lost or doubled expert shows at 1e-1. The steep routers of the tiny qwen3_moe
# amplify every rounding: one of 2^-24 in its weights moves the Gram matrix by up to 4e-6 (mixtral's by
# 9e-7). With routers of 0.15 times the weights tensor parallelism is as exact as a pipeline (1e-6).
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    folder = tmp_path_factory.mktemp("experts")
    for name, write in MODELS.items():
        write(folder / name)
    jobs = gradient_jobs(folder, CASES, LAYOUTS)
    model, shared = str(folder / "qwen3_moe"), LAYOUTS["TP2xEP2"]
    sampled = {"batch_size": 4, "eos_ids": [2], "megatron_layers": [], "runs": [{"max_new_tokens": 6}]}
    # A tenth of the vocabulary ends a response: data ranks end after different numbers of tokens.
    apart = {**sampled, "eos_ids": list(range(20)), "batch_size": 2, "runs": ENDING, "apart": True}
    jobs.append(("check_generation", {"model": model, "layout": shared, **sampled}))
    keys = [*CASES, ("generation", "TP2xEP2")]
    for name, layout in CASES:
        if layout in SHARING:
            paths = {"model": str(folder / name), "weights": str(folder / name)}
            paths["export"] = str(folder / f"whole-{name}-{layout}")
            jobs.append(
                ("check_weights", {"layout": LAYOUTS[layout], "dtype": "fp32", "tokens": 20, **paths})
            )
            keys.append((f"weights {name}", layout))
    for name, others in SHARING.items():
        folders = {"folder": str(folder / f"run-{name}"), "load": {other: LAYOUTS[other] for other in others}}
        jobs.append(("check_experts", {"model": model, "layout": LAYOUTS[name], **folders}))
        keys.append(("run", name))
    for name in ("DP2", "DP2xEP2"):
        jobs.append(("check_generation", {"model": model, "layout": LAYOUTS[name], **apart}))
        keys.append(("generation", name))
    for name, (layout, sections) in STEPS.items():
        jobs.append(steps_job(folder, name, layout, sections))
        keys.append(("steps", name))
    for name, job in one_pass_jobs(folder, ranks=2).items():
        jobs.append(job)
        keys.append(("one pass", name))
    found = dict(zip(keys, launch(2, jobs, folder), strict=True))
    alone = [steps_job(folder, name, {}, sections) for name, sections in ALONE.items()]
    found |= zip([("steps", name) for name in ALONE], launch(1, alone, folder), strict=True)
    for name in (*STEPS, *ALONE):
        of(found["steps", name])["moved"] = moved(folder / "qwen3_moe", folder / name)
    four = one_pass_jobs(folder, ranks=4)
    jobs = [*four.values(), *gradient_jobs(folder, FOUR_CASES, FOUR)]
    keys = [*(("one pass", name) for name in four), *FOUR_CASES]
    return found | dict(zip(keys, launch(4, jobs, folder), strict=True))


def gradient_jobs(
    folder: Path, cases: list[tuple[str, str]], layouts: dict[str, dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    return [
        (
            "check_gradient",
            {
                "model": str(folder / model),
                "export": str(folder / f"{model}-{layout}"),
                "layout": layouts[layout],
                "shared": layout == "TP2xEP2",
            },
        )
        for model, layout in cases
    ]


def steps_job(
    folder: Path, name: str, layout: dict[str, Any], sections: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Two steps, because the first one's gradient of an adapter is that of one of its two factors."""
    sgd = {"name": "sgd", "distributed": False, "lr": 0.05}
    arguments = {"optimizer": sgd, "sections": sections, "steps": 2, "export": str(folder / name)}
    return ("check_engine", {"model": str(folder / "qwen3_moe"), "layout": layout, **arguments})


def one_pass_jobs(folder: Path, ranks: int) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        name: (
            "check_one_pass",
            {"model": str(folder / model), "layout": layout, "sections": sections, "losses": losses},
        )
        for name, (count, model, layout, sections, losses) in ONE_PASS.items()
        if count == ranks
    }


def of(outcome: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in outcome, outcome["error"]
    found: dict[str, Any] = outcome["result"]
    return found


def moved(before: Path, after: Path) -> Tensor:
    """What an update took from the parameters, flat."""
    old, new = parameters(before), parameters(after)
    return torch.cat([(old[name].double() - new[name].double()).flatten() for name in sorted(old)])


@pytest.mark.parametrize(("model", "layout"), CASES + FOUR_CASES)
def test_every_layout_has_the_gradient_of_one_process(
    results: dict[tuple[str, str], Any], model: str, layout: str
) -> None:
    found = of(results[model, layout])
    print(f"{model} {layout}: Gram error {found['gram_error']:.2e}")
    assert found["gram_error"] <= TOLERANCE
    worst = max(found["errors"], key=found["errors"].__getitem__)
    assert found["errors"][worst] <= TOLERANCE, worst


@pytest.mark.parametrize("sharing", SHARING)
def test_the_gram_matrix_predicts_the_norm_of_megatron(
    results: dict[tuple[str, str], Any], sharing: str
) -> None:
    """Of experts and of all else together, behind every step of Adam with the distributed optimizer."""
    for measured, predicted in of(results["run", sharing])["norms"]:
        assert predicted == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize(("sharing", "layout"), [(s, layout) for s in SHARING for layout in SHARING[s]])
def test_a_checkpoint_of_shared_experts_loads_in_every_layout(
    results: dict[tuple[str, str], Any], sharing: str, layout: str
) -> None:
    """Weights bit by bit; the next two Gram matrices to the rounding of steps that other ranks computed.

    The second of them is that of weights which a step with the loaded moments has led to.
    """
    run = of(results["run", sharing])
    found = run["layouts"][layout]
    assert found["loaded"] == []
    for gram, expected in zip(found["grams"], run["grams"][2:], strict=True):
        print(f"{sharing} in {layout}: {gram_error(torch.tensor(gram), torch.tensor(expected)):.2e}")
        assert gram_error(torch.tensor(gram), torch.tensor(expected)) <= TOLERANCE


@pytest.mark.parametrize("sharing", SHARING)
def test_every_rank_knows_of_weights_of_another_that_are_not_finite(
    results: dict[tuple[str, str], Any], sharing: str
) -> None:
    assert of(results["run", sharing])["finite"] == [True, False]


@pytest.mark.parametrize(("model", "layout"), [case for case in CASES if case[1] in SHARING])
def test_logits_and_export_of_shared_experts(
    results: dict[tuple[str, str], Any], model: str, layout: str
) -> None:
    found = of(results[f"weights {model}", layout])
    print(f"{model} {layout}: logit error {found['logit_error']:.2e}")
    assert found["different"] == []
    assert found["logit_error"] <= TOLERANCE


def test_generation_with_shared_experts_is_the_training_forward(results: dict[tuple[str, str], Any]) -> None:
    (found,) = of(results["generation", "TP2xEP2"])["runs"]
    assert found["same"]
    assert found["logprob_error"] <= 1e-5  # log-probabilities of 5 to 6, in fp32


def test_data_ranks_that_share_experts_generate_what_they_would_alone(
    results: dict[tuple[str, str], Any],
) -> None:
    """They wait for each other, although their responses end at different tokens."""
    apart, shared = (of(results["generation", name])["runs"] for name in ("DP2", "DP2xEP2"))
    for alone, found in zip(apart, shared, strict=True):
        assert found["same"] and found["logprob_error"] <= 1e-5
        assert found["everywhere"] == alone["everywhere"]
        assert len({len(tokens_BT[0]) for tokens_BT in found["everywhere"]}) == 2


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_one_process(results: dict[tuple[str, str], Any], name: str) -> None:
    """Of routers' losses tests/engine/megatron/gradients/test_experts.py compares it with transformers."""
    alone, found = of(results["steps", name.split()[0]]), of(results["steps", name])
    for step, (gram, expected) in enumerate(zip(found["gram"], alone["gram"], strict=True)):
        error = gram_error(torch.tensor(gram), torch.tensor(expected))
        print(f"{name}: Gram error of step {step} against one process {error:.2e}")
        assert error <= TOLERANCE
    assert found["norm"][0] == pytest.approx(alone["norm"][0], rel=TOLERANCE)
    assert float((found["moved"] - alone["moved"]).norm() / alone["moved"].norm()) <= TOLERANCE


@pytest.mark.parametrize("name", ONE_PASS)
def test_rows_of_one_pass_are_those_of_separate_passes(
    results: dict[tuple[str, str], Any], name: str
) -> None:
    """fp32 sums in another order, of the same forward: the same experts are chosen. 6e-7 were seen."""
    for loss, found in of(results["one pass", name]).items():
        assert max(found["errors"]) <= 1e-5, loss
        assert "reduce" in found["phases"]
        assert not any("backward/" in phase for phase in found["phases"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_compared_with_one_process_was_one_pass(
    results: dict[tuple[str, str], Any], layout: str
) -> None:
    """``auto`` takes it, and a pipeline that meets clipped ratios starts again by separate passes."""
    for phases in of(results["steps", f"routers {layout}"])["phases"]:
        assert any(phase.startswith("forward_backward/") for phase in phases) == (layout == "PP2")
