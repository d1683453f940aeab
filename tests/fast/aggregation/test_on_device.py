"""The device form of every method that has one, against the same formula without those that take no part.

It runs on the CPU here, through the same tensor operations; tests/gpu runs it on a device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gapo_mega import aggregation
from gapo_mega.aggregation.on_device import DeviceMethod
from gapo_mega.aggregation.safe import SafeMethod
from gapo_mega.ops import Status

NAMES = sorted(name for name, method in aggregation.methods().items() if issubclass(method, DeviceMethod))
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("gapo", {"p": 0}),
    ("gapo", {"p": 2}),
    ("gapo", {"p": 2.5, "eq17_literal": True}),
    ("gapo", {"rates": [0.1, 3, 1, 2]}),
    ("gapo", {"p": 2, "rates": "preference", "preference": [0.1, 0.2, 0.3, 0.4]}),
    ("mgda_decoupled", {"losses": [0.1, 2, 3, 0.4]}),
    ("p_gapo", {"preference": [0.1, 0.2, 0.3, 0.4]}),
    ("p_gapo", {"preference": [0.1, 0.2, 0.3, 0.4], "safe": True}),
    ("weighted_sum", {"weights": [1, 0, 2, 0.5]}),
    ("weighted_sum", {"weights": [1, 0, 2, 0.5], "safe": True}),
]


def gram_of(seed: int, zero: tuple[int, ...] = (), spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    rows *= 10 ** (spread * torch.rand(4, 1, generator=generator, dtype=torch.float64))
    rows[list(zero)] = 0.0
    return rows @ rows.T


def device_method(name: str, **options: Any) -> DeviceMethod:
    method = aggregation.build(name, **options)
    assert isinstance(method, DeviceMethod)
    return method


def options_of(options: dict[str, Any], active: list[int]) -> dict[str, Any]:
    """The same for the objectives ``active`` alone; a preference has to have sum 1."""
    picked = dict(options)
    for option in {"preference", "weights", "losses", "rates"} & {
        key for key, value in options.items() if isinstance(value, list)
    }:
        picked[option] = [options[option][i] for i in active]
    if "preference" in options:
        picked["preference"] = [x / sum(picked["preference"]) for x in picked["preference"]]
    return picked


def test_the_papers_methods_have_one() -> None:
    assert {"gapo", "p_gapo", "mgda", "weighted_sum"} <= set(NAMES)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("scale", ["none", "sum_to_one", "mean_norm"])
@pytest.mark.parametrize("zero", [(), (1,), (0, 3), (0, 1, 2, 3)])
def test_weights_are_those_of_the_objectives_that_take_part(
    name: str, options: dict[str, Any], scale: str, zero: tuple[int, ...]
) -> None:
    method = device_method(name, scale=scale, **options)
    active = [i for i in range(4) if i not in zero]
    others = device_method(name, scale=scale, **options_of(options, active)) if active else None
    for seed in range(5):
        gram = gram_of(seed, zero)
        expected = torch.zeros(4, dtype=torch.float64)
        if others is not None:
            expected[active] = others(gram[active][:, active])
        found = method.weigh(gram)
        assert (int(found.status), found.status.dtype, found.status.shape) == (Status.OK, torch.int32, (1,))
        # One formula, but sums over all objectives here and over those that take part there.
        torch.testing.assert_close(found.weights, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_status(name: str, bad: float) -> None:
    gram = gram_of(0)
    gram[2], gram[:, 2] = bad, bad
    found = device_method(name).weigh(gram)
    assert (found.weights.tolist(), int(found.status)) == ([0.0] * 4, Status.NOT_FINITE)


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_stops_on_demand(name: str) -> None:
    found = device_method(name, zero_gradient="stop").weigh(gram_of(0, (1,)))
    assert (found.weights.tolist(), int(found.status)) == ([0.0] * 4, Status.ZERO_GRADIENT)


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_diagonal_is_a_status(name: str) -> None:
    gram = torch.diag(torch.tensor([1.0, -1.0])).double()
    found = device_method(name).weigh(gram)
    assert (found.weights.tolist(), int(found.status)) == ([0.0] * 2, Status.NEGATIVE_DIAGONAL)


def test_weights_beyond_double_precision_are_a_status() -> None:
    gram = torch.diag(torch.tensor([1e-40, 1e-38])).double()
    found = device_method("gapo", p=30).weigh(gram)
    assert (found.weights.tolist(), int(found.status)) == ([0.0] * 2, Status.OUT_OF_RANGE)
    found = device_method("gapo", p=30, scale="mean_norm").weigh(gram)
    assert int(found.status) == Status.OK and bool(found.weights.any())


def test_options_of_another_number_of_objectives_are_refused() -> None:
    with pytest.raises(ValueError, match="preference: found 2 numbers"):
        device_method("p_gapo", preference=[0.5, 0.5]).weigh(gram_of(0))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"gapo", "mgda", "mgda_decoupled"}))
def test_it_never_reads_a_value_on_the_host(name: str) -> None:
    """Fake tensors have no values, so reading one raises. Methods that call the compiled solver cannot be
    traced (it takes addresses): tests/gpu captures them in a CUDA graph, which is the same check."""
    safe = issubclass(aggregation.methods()[name], SafeMethod)
    method = device_method(name, **({"safe": False} if safe else {}))  # the projection is the host's
    with FakeTensorMode():
        found = method.weigh(torch.empty(4, 4, dtype=torch.float64))
    assert found.weights.shape == (4,) and found.status.shape == (1,)
