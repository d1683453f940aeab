"""Running means of gradients over two data ranks, and from their checkpoint in other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.averages import assert_as_reference
from tests.helpers.ranks import check_averages
from tests.helpers.ranks.launch import launch, result
from tests.helpers.tiny import tiny_llama

# By name: sections of the configuration. All with two data ranks; SGD has no distributed optimizer.
CASES: dict[str, dict[str, Any]] = {
    "one pass": {"optimizer": {"lr": 1e-3}, "sections": {"gradients": {"forward": "one_pass"}}},
    "separate": {"optimizer": {"lr": 1e-3}, "sections": {"gradients": {"forward": "separate"}}},
    "sgd": {"optimizer": {"name": "sgd", "distributed": False, "lr": 0.05}},
}
LAYOUTS: dict[str, dict[str, Any]] = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """One launch for what saves, another one for what loads."""
    tiny_llama(folder / "model")
    common = {"model": str(folder / "model"), "layout": {}}
    saving = {
        name: {
            **common,
            **case,
            "export": str(folder / name / "models"),
            "save": str(folder / name / "saved"),
        }
        for name, case in CASES.items()
    }
    names = list(CASES)
    loading = {
        **{
            f"{name} again": {**common, **CASES[name], "load": str(folder / name / "saved")} for name in names
        },
        **{
            layout: {
                **common,
                **CASES["one pass"],
                "layout": sizes,
                "load": str(folder / "one pass" / "saved"),
            }
            for layout, sizes in LAYOUTS.items()
        },
    }
    found = {}
    for jobs in (saving, loading):
        outcomes = launch(2, [("check_averages", job) for job in jobs.values()], folder)
        found |= dict(zip(jobs, outcomes, strict=True))
    return found


@pytest.mark.parametrize("name", CASES)
def test_against_float64(results: dict[str, dict[str, Any]], folder: Path, name: str) -> None:
    assert_as_reference(result(results, name), folder / name / "models", 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_same_layout_goes_on_bit_for_bit(results: dict[str, dict[str, Any]], name: str) -> None:
    found, expected = result(results, f"{name} again"), result(results, name)
    for key in ("weights", "gram", "averaged"):
        assert found[key] == expected[key][check_averages.SAVED :]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_goes_on(results: dict[str, dict[str, Any]], layout: str) -> None:
    """Sums in another order; after the first update Adam divides by small numbers."""
    found, expected = result(results, layout), result(results, "one pass")
    for step, tolerance in enumerate((2e-5, 2e-3)):
        mine, single = found["weights"][step], expected["weights"][check_averages.SAVED + step]
        assert mine == pytest.approx(single, rel=tolerance)
