"""Every parallel layout against the single-process run from the same weights and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.distributed.check_engine import parameters
from tests.distributed.launch import launch
from tests.tiny import tiny_llama

pytestmark = pytest.mark.distributed

SGD = {"name": "sgd", "distributed": False, "lr": 0.05}
ADAM = {"name": "adam", "lr": 0.01, "eps": 1e-4}
OPTIMIZERS = {"sgd": SGD, "adam": ADAM}
TP2, PP2, DP = {"tensor": 2}, {"pipeline": 2}, {}
TP2PP2 = {"tensor": 2, "pipeline": 2}
MODELS = {"untied": {}, "tied": {"tied": True}, "nine_heads": {"heads": 9, "groups": 3}}
BF16 = (("model", {"dtype": "bf16"}),)
# bf16 keeps 8 bits of every activation: a few per cent of a gradient's length over four layers.
BF16_ERROR = 5e-2


class Case(NamedTuple):
    """One run of check_engine."""

    name: str
    ranks: int
    layout: dict[str, Any]
    model: str
    optimizer: str
    sections: tuple[tuple[str, Any], ...] = ()

    @property
    def reference(self) -> str:
        """The same in one process, in fp32."""
        return f"single-{self.model}-{self.optimizer}"


def cases() -> list[Case]:
    """The layouts of the tests, each with tied and untied embeddings, SGD and Adam; then options."""
    layouts = [("TP2", 2, TP2), ("PP2", 2, PP2), ("DP2", 2, DP), ("TP2xPP2", 4, TP2PP2), ("TP2xDP2", 4, TP2)]
    found = [
        Case(f"{name}-{model}-{optimizer}", ranks, layout, model, optimizer)
        for name, ranks, layout in layouts
        for model in ("untied", "tied")
        for optimizer in OPTIMIZERS
    ]
    overlap = (("optimizer", {"overlap_grad_reduce": True}),)
    return [
        *found,
        Case("TP3-nine_heads-adam", 3, {"tensor": 3}, "nine_heads", "adam"),
        Case("TP2-sequence-adam", 2, {**TP2, "sequence_parallel": True}, "tied", "adam"),
        Case("DP2-overlap-adam", 2, DP, "untied", "adam", overlap),
        Case("PP2-recompute-adam", 2, PP2, "untied", "adam", (("model", {"recompute": "full"}),)),
        Case("DP2-plain-adam", 2, DP, "untied", "adam", (("optimizer", {"distributed": False}),)),
    ]


def bf16_cases() -> list[Case]:
    """bf16 with fp32 main parameters."""
    layouts = [("TP2", 2, TP2), ("PP2", 2, PP2), ("DP2", 2, DP), ("TP2xDP2", 4, TP2)]
    return [Case(f"{name}-bf16", ranks, layout, "tied", "adam", BF16) for name, ranks, layout in layouts]


def singles() -> list[Case]:
    """The single-process runs that the others are compared with."""
    pairs = [(m, o) for m in ("untied", "tied") for o in OPTIMIZERS] + [("nine_heads", "adam")]
    return [Case(f"single-{m}-{o}", 1, DP, m, o) for m, o in pairs]


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
        "steps": 3,
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
        result = _result(runs, case.name)
        assert result["predicted_norm"] == pytest.approx(result["norm"], rel=1e-5)

    def test_parameters_after_three_steps(self, runs: dict[str, Any], case: Case) -> None:
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


@pytest.mark.parametrize("case", bf16_cases(), ids=lambda case: case.name)
def test_bf16_against_fp32(runs: dict[str, Any], case: Case) -> None:
    """Losses, Gram and norm of the first step in bf16 against the single fp32 process."""
    result, single = _result(runs, case.name), _result(runs, case.reference)
    gram, expected = (torch.tensor(r["gram"][0], dtype=torch.float64) for r in (result, single))
    norms = expected.diagonal().sqrt()
    error = float(((gram - expected).abs() / torch.outer(norms, norms)).max())
    assert 1e-7 < error <= BF16_ERROR, "outside what 8 bits explain"
    assert result["losses"][0] == pytest.approx(single["losses"][0], abs=BF16_ERROR)
    # The identity holds to fp32 whatever the gradients' type was: both sides sum the same numbers.
    assert result["predicted_norm"] == pytest.approx(result["norm"], rel=1e-5)


def test_layouts_really_ran(runs: dict[str, Any]) -> None:
    """The worlds were as large as the names say."""
    for case in [*cases(), *bf16_cases()]:
        assert _result(runs, case.name)["world"] == case.ranks
