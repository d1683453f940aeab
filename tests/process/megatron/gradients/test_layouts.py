"""Every parallel layout against the single-process run from the same weights and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.combinations.comparison import gram_error
from tests.helpers.ranks.check_engine import parameters
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama

STEPS = 2  # the second from another Gram matrix, and with Adam's moments of the first
SGD = {"name": "sgd", "distributed": False, "lr": 0.05}
ADAM = {"name": "adam", "lr": 0.01, "eps": 1e-4}
GATHER = {"overlap_grad_reduce": True, "overlap_param_gather": True}
OPTIMIZERS = {"sgd": SGD, "adam": ADAM}
TP2, PP2, DP = {"tensor": 2}, {"pipeline": 2}, {}
TP2PP2 = {"tensor": 2, "pipeline": 2}
VPP2 = {"pipeline": 2, "virtual_pipeline": 2}
MODELS = {
    "untied": {},
    "tied": {"tied": True},
    "nine_heads": {"heads": 9, "groups": 3},
    "six_layers": {"num_hidden_layers": 6},
}
# Settings that change the Gram matrix; all others must not. Layers 1 and 2 lie on both sides of PP2's cut.
MEASURED: dict[str, dict[str, Any]] = {
    "full": {"forward": "separate"},
    "unclipped": {"forward": "separate"},
    "adam": {"metric": "adam", "forward": "separate"},
    "last_layer": {"scope": "last_layer", "forward": "separate"},
    "last_block": {"scope": "last_block", "forward": "separate"},
    "layers": {"scope": [[1, 3]], "forward": "separate"},
}
ONE_PASS = {"forward": "one_pass"}
TURNS = {"forward": "shared"}  # with several microbatches: objectives take turns
BF16 = (("model", {"dtype": "bf16"}),)
# bf16 keeps 8 bits of every activation: about a per cent of a gradient's length over four layers.
BF16_ERROR = 2e-2


class Case(NamedTuple):
    """One run of check_engine."""

    name: str
    ranks: int
    layout: dict[str, Any]
    model: str
    optimizer: str
    sections: tuple[tuple[str, Any], ...] = ()
    measured: str = "full"  # what the Gram matrix is made of, a key of MEASURED

    @property
    def reference(self) -> str:
        """The same in one process, in fp32."""
        return f"single-{self.model}-{self.optimizer}-{self.measured}"


def cases() -> list[Case]:
    """The layouts of the tests, each with tied and untied embeddings, SGD and Adam; then options.

    `make combinations` has the other pairs.
    """
    layouts = [("TP2", 2, TP2), ("PP2", 2, PP2), ("DP2", 2, DP), ("TP2xPP2", 4, TP2PP2), ("TP2xDP2", 4, TP2)]
    found = [
        Case(f"{name}-{model}-{optimizer}", ranks, layout, model, optimizer)
        for name, ranks, layout in layouts
        for model, optimizer in (("untied", "sgd"), ("tied", "adam"))
    ]
    overlap = (("optimizer", {"overlap_grad_reduce": True}),)
    gather = (("optimizer", GATHER),)
    return [
        *found,
        *interleaved_cases(),
        Case("DP2-gather-adam", 2, DP, "tied", "adam", gather),
        Case("TP2xDP2-sequence-gather-adam", 4, {**TP2, "sequence_parallel": True}, "untied", "adam", gather),
        Case("PP2xDP2-gather-adam", 4, PP2, "tied", "adam", gather),
        *strategy_cases(),
        *one_pass_cases(),
        Case("TP3-nine_heads-adam", 3, {"tensor": 3}, "nine_heads", "adam"),
        Case("TP2-sequence-adam", 2, {**TP2, "sequence_parallel": True}, "tied", "adam"),
        Case("DP2-overlap-adam", 2, DP, "untied", "adam", overlap),
        Case("PP2-recompute-adam", 2, PP2, "untied", "adam", (("model", {"recompute": "full"}),)),
        Case("DP2-plain-adam", 2, DP, "untied", "adam", (("optimizer", {"distributed": False}),)),
    ]


def interleaved_cases() -> list[Case]:
    """Several chunks of layers a stage; layer 1 and 2 lie on different stages, as in every other layout."""
    full, selective = ({"model": {"recompute": kind}} for kind in ("full", "selective"))
    gather = {"optimizer": GATHER}
    sequence = {**TP2, "sequence_parallel": True}
    table: list[tuple[str, int, dict[str, Any], str, str, str, dict[str, Any], dict[str, Any]]] = [
        ("PP2", 2, {}, "tied", "sgd", "full", {}, {}),
        ("PP2", 2, {}, "tied", "adam", "full", {}, {}),
        ("TP2xPP2", 4, TP2, "tied", "adam", "full", {}, {}),
        ("TP2xPP2-sequence-recompute", 4, sequence, "untied", "sgd", "full", {}, full),
        ("PP2xDP2-gather", 4, {}, "tied", "adam", "full", {}, gather),
        ("PP2-single", 2, {}, "untied", "sgd", "full", {"store": "single"}, {}),
        ("PP2xDP2-adam-metric", 4, {}, "tied", "adam", "adam", {}, {}),
        ("PP2-last_layer", 2, {}, "tied", "adam", "last_layer", {}, {}),
        ("PP2-layers-selective", 2, {}, "tied", "adam", "layers", {}, selective),
        # Eight microbatches over three stages: groups of four.
        ("PP3", 3, {"pipeline": 3}, "six_layers", "sgd", "full", {}, {"micro_batch_size": 1}),
    ]
    return [
        Case(
            f"{name}-interleaved-{model}-{optimizer}",
            ranks,
            {**VPP2, **layout},
            model,
            optimizer,
            tuple({"gradients": {**MEASURED[measured], **gradients}, **sections}.items()),
            measured,
        )
        for name, ranks, layout, model, optimizer, measured, gradients, sections in table
    ]


def strategy_cases() -> list[Case]:
    """Every gradient strategy where its communication differs."""
    sequence = {**TP2, "sequence_parallel": True}
    overlap = {"optimizer": {"overlap_grad_reduce": True}}
    plain = {"optimizer": {"distributed": False}}
    full, selective = ({"model": {"recompute": kind}} for kind in ("full", "selective"))
    single, whole = {"store": "single"}, {"micro_batch_size": 4}
    table: list[tuple[str, int, dict[str, Any], str, str, dict[str, Any], dict[str, Any]]] = [
        ("TP2-sequence-turns", 2, sequence, "tied", "full", TURNS, selective),
        ("DP2-overlap-turns", 2, DP, "untied", "full", TURNS, overlap),
        ("TP2xDP2-sequence-plain-turns", 4, sequence, "tied", "full", TURNS, plain),
        ("PP2xDP2-adam-metric-plain", 4, PP2, "untied", "adam", {}, plain),
        ("PP2-single", 2, PP2, "tied", "full", single, {}),
        ("DP2-single-shared", 2, DP, "untied", "full", {**single, **TURNS}, whole),
        ("DP2-shared-recompute", 2, DP, "tied", "full", TURNS, {**full, **whole}),
        ("PP2-last_layer", 2, PP2, "tied", "last_layer", {}, {}),
        ("TP2-sequence-last_layer", 2, sequence, "untied", "last_layer", {}, {}),
        ("DP2-last_layer-shared", 2, DP, "untied", "last_layer", TURNS, whole),
        ("TP2xPP2-last_block", 4, TP2PP2, "tied", "last_block", {}, {}),
        ("DP2-overlap-last_block-shared", 2, DP, "tied", "last_block", TURNS, {**overlap, **whole}),
        ("DP2-overlap-layers", 2, DP, "tied", "layers", {}, overlap),
        ("DP2-overlap-adam-metric-turns", 2, DP, "tied", "adam", TURNS, overlap),
        ("TP2xDP2-sequence-single", 4, sequence, "tied", "full", single, {}),
    ]
    return [
        Case(
            f"{name}-adam",
            ranks,
            layout,
            model,
            "adam",
            (*more.items(), ("gradients", {**MEASURED[measured], **gradients})),
            measured,
        )
        for name, ranks, layout, model, measured, gradients, more in table
    ]


def one_pass_cases() -> list[Case]:
    """Clipped ratios make some sequences' cotangents point in two directions; without, all have one."""
    sequence = {**TP2, "sequence_parallel": True}
    plain, full = {"optimizer": {"distributed": False}}, {"model": {"recompute": "full"}}
    gather, whole = {"optimizer": GATHER}, {"micro_batch_size": 4}
    table: list[tuple[str, int, dict[str, Any], str, str, str, dict[str, Any]]] = [
        ("TP2", 2, TP2, "untied", "adam", "unclipped", whole),
        ("DP2-plain", 2, DP, "untied", "adam", "full", plain),
        ("DP2-recompute", 2, DP, "tied", "adam", "full", full),
        ("DP2-adam-metric", 2, DP, "tied", "adam", "adam", {}),
        ("TP2-sequence", 2, sequence, "tied", "sgd", "full", {}),
        ("TP2xDP2-sequence-gather", 4, sequence, "untied", "adam", "unclipped", gather),
        ("TP2xDP2", 4, TP2, "tied", "sgd", "full", {}),
        ("TP3", 3, {"tensor": 3}, "nine_heads", "adam", "full", {}),
        ("PP2", 2, PP2, "tied", "sgd", "unclipped", {}),
        ("PP2-clipped", 2, PP2, "tied", "adam", "full", {}),
        ("PP2xDP2-gather", 4, PP2, "tied", "adam", "unclipped", gather),
        ("TP2xPP2-sequence", 4, {**TP2PP2, "sequence_parallel": True}, "tied", "sgd", "unclipped", {}),
        ("PP2-interleaved", 2, VPP2, "tied", "sgd", "unclipped", {}),
        ("TP2xPP2-interleaved-recompute", 4, {**TP2, **VPP2}, "tied", "adam", "unclipped", full),
    ]
    return [
        Case(
            f"{name}-one_pass-{model}-{optimizer}-{measured}",
            ranks,
            layout,
            model,
            optimizer,
            (*more.items(), ("gradients", {**MEASURED[measured], **ONE_PASS})),
            measured,
        )
        for name, ranks, layout, model, optimizer, measured, more in table
    ]


def bf16_cases() -> list[Case]:
    """bf16 with fp32 main parameters."""
    layouts: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
        ("PP2", 2, PP2, {}),
        ("DP2-turns", 2, DP, TURNS),
        ("TP2-single", 2, TP2, {"store": "single"}),
        ("DP2-rows", 2, DP, {"store_dtype": "bf16"}),
        ("TP2xPP2", 4, TP2PP2, {}),
        ("TP2-sequence-one_pass", 2, {**TP2, "sequence_parallel": True}, ONE_PASS),
    ]
    return [
        Case(f"{name}-bf16", ranks, layout, "tied", "adam", (*BF16, ("gradients", gradients)))
        for name, ranks, layout, gradients in layouts
    ]


def singles() -> list[Case]:
    """The single-process runs that the others are compared with."""
    wanted = {(c.model, c.optimizer, c.measured) for c in [*cases(), *bf16_cases()]}
    return [
        Case(f"single-{m}-{o}-{k}", 1, DP, m, o, (("gradients", MEASURED[k]),), k)
        for m, o, k in sorted(wanted)
    ]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results by case name; one launch per number of ranks."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, options in MODELS.items():
        tiny_llama(folder / name, **options)
    everything = [*singles(), *cases(), *bf16_cases()]
    results: dict[str, dict[str, Any]] = {}
    for ranks in sorted({case.ranks for case in everything}):
        batch = [case for case in everything if case.ranks == ranks]
        jobs = [("check_engine", _arguments(case, folder)) for case in batch]
        for case, result in zip(batch, launch(ranks, jobs, folder), strict=True):
            results[case.name] = {**result, "export": folder / case.name, "start": folder / case.model}
    return results


def _arguments(case: Case, folder: Path) -> dict[str, Any]:
    sections = dict(case.sections)
    optimizer = {**OPTIMIZERS[case.optimizer], **sections.pop("optimizer", {})}
    return {
        "model": str(folder / case.model),
        "layout": case.layout,
        "optimizer": optimizer,
        "sections": sections,
        "clip_epsilon": 0.1 if case.measured != "unclipped" else 100.0,
        "steps": STEPS,
        "export": str(folder / case.name),
    }


def _result(runs: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    assert "error" not in runs[name], runs[name]["error"]
    result: dict[str, Any] = runs[name]["result"]
    return result


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
class TestAgainstSingleProcess:
    """fp32 sums in another order: errors of ~1e-7 of the terms, so 1e-5 leaves two digits."""

    def test_losses(self, runs: dict[str, Any], case: Case) -> None:
        mine = torch.tensor(_result(runs, case.name)["losses"])
        single = torch.tensor(_result(runs, case.reference)["losses"])
        torch.testing.assert_close(mine, single, rtol=1e-5, atol=1e-5 * float(single.abs().max()))

    def test_gram(self, runs: dict[str, Any], case: Case) -> None:
        mine = torch.tensor(_result(runs, case.name)["gram"], dtype=torch.float64)
        single = torch.tensor(_result(runs, case.reference)["gram"], dtype=torch.float64)
        norms = single.diagonal(dim1=1, dim2=2).sqrt()
        error = ((mine - single).abs() / (norms[:, :, None] * norms[:, None, :])).amax(dim=(1, 2))
        assert float(error[0]) <= 1e-5
        # Later Gram matrices belong to parameters that Adam let drift apart by up to 1e-3 of the update.
        assert float(error.max()) <= (1e-5 if case.optimizer == "sgd" else 1e-3)

    def test_norm_identity(self, runs: dict[str, Any], case: Case) -> None:
        """sqrt(w'Gw) is what Megatron itself measures of the combined gradient."""
        if case.measured not in ("full", "unclipped"):
            return  # the Gram matrix is not that of the whole gradient
        result = _result(runs, case.name)
        assert result["predicted_norm"] == pytest.approx(result["norm"], rel=1e-5)

    def test_actual_change(self, runs: dict[str, Any], case: Case) -> None:
        """A sum over all ranks' parameters; of steps that Adam lets differ by up to 1e-3."""
        mine, single = (_result(runs, name)["actual_change"] for name in (case.name, case.reference))
        if case.measured != "adam":
            assert mine == single == [None] * STEPS
            return
        found, expected = (torch.tensor(changes, dtype=torch.float64) for changes in (mine, single))
        size = expected.abs().amax(dim=1, keepdim=True)
        assert bool((size > 0).all()) and bool(((found - expected).abs() <= 1e-3 * size).all())

    def test_parameters_after_the_steps(self, runs: dict[str, Any], case: Case) -> None:
        """SGD: the parameters to 1e-5. Adam divides by small numbers, hence 1e-3 of the update."""
        mine, single = parameters(runs[case.name]["export"]), parameters(runs[case.reference]["export"])
        start = parameters(runs[case.name]["start"])
        assert mine.keys() == single.keys()
        difference = sum(float((mine[k] - single[k]).double().square().sum()) for k in single) ** 0.5
        update = sum(float((single[k] - start[k]).double().square().sum()) for k in single) ** 0.5
        size = sum(float(single[k].double().square().sum()) for k in single) ** 0.5
        assert update > 1e-4 * size, "nothing was trained"
        assert difference <= 1e-3 * update
        if case.optimizer == "sgd":
            assert difference <= 1e-5 * size


@pytest.mark.parametrize("case", one_pass_cases(), ids=lambda case: case.name)
def test_one_pass_was_all_it_took(runs: dict[str, Any], case: Case) -> None:
    """A pipeline that meets clipped ratios starts again by separate passes; no other layout does."""
    again = case.layout.get("pipeline", 1) > 1 and case.measured == "full"
    for phases in _result(runs, case.name)["phases"]:
        assert any(phase.startswith("forward_backward/") for phase in phases) == again


@pytest.mark.parametrize("case", bf16_cases(), ids=lambda case: case.name)
def test_bf16_against_fp32(runs: dict[str, Any], case: Case) -> None:
    """Losses, Gram and norm of the first step in bf16 against the single fp32 process."""
    result, single = _result(runs, case.name), _result(runs, case.reference)
    gram, expected = (torch.tensor(r["gram"][0], dtype=torch.float64) for r in (result, single))
    assert 1e-7 < gram_error(gram, expected) <= BF16_ERROR, "outside what 8 bits explain"
    assert result["losses"][0] == pytest.approx(single["losses"][0], abs=BF16_ERROR)
    # The identity holds to fp32 whatever the gradients' type was, where both sides sum the same numbers;
    # `single` measures sums in passes of their own.
    tolerance = BF16_ERROR if "single" in case.name else 1e-5
    assert result["predicted_norm"] == pytest.approx(result["norm"], rel=tolerance)


def test_layouts_really_ran(runs: dict[str, Any]) -> None:
    """The worlds were as large as the names say."""
    for case in [*cases(), *bf16_cases()]:
        assert _result(runs, case.name)["world"] == case.ranks
