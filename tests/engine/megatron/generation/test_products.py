"""Products with packed and with plain weights against float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from gapo_mega.engine.megatron.generation import products

# Of a product's largest entry: four roundings of the type at most, and in fp32 those of 96 terms.
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 33, 500])
@torch.no_grad()
def test_products_equal_float64(rows: int, packs: bool, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(rows)
    weight, gate, bias, x, other = (
        torch.randn(*shape, generator=source).to(dtype)
        for shape in ((60, 96), (120, 96), (60,), (rows, 96), (rows, 60))
    )
    with nullcontext() if packs else torch.backends.mkldnn.flags(enabled=False):
        plain, biased = products.product(weight), products.product(weight, bias)
        gated = products.gated(gate)
    exact = x.double() @ weight.double().T
    halves = x.double() @ gate.double()[:60].T, x.double() @ gate.double()[60:].T
    for found, expected in (
        (plain(x), exact),
        (biased(x), exact + bias.double()),
        (plain.plus(x, other), exact + other.double()),
        (gated(x), torch.nn.functional.silu(halves[0]) * halves[1]),
    ):
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found.double() - expected).abs().max() < PRECISION[dtype] * expected.abs().max()


@torch.no_grad()
def test_a_packed_weight_is_a_copy_and_a_plain_one_is_not() -> None:
    weight, x = torch.ones(4, 8), torch.ones(2, 8)
    packed = products.product(weight)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = products.product(weight)
    weight.zero_()
    assert (packed(x) == 8).all() and (plain(x) == 0).all()
