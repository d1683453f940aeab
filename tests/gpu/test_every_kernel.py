"""Every kernel once, on few elements: what a checker of memory goes through, which slows launches down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapo_mega import ops
from tests.helpers.grams import residual
from tests.helpers.on_gpu import CHUNK, DTYPES, assert_gram_close, combine_and_compare, normal, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH = CHUNK + 77
# One type in all rows, and different ones.
KINDS = [[DTYPES[0]], [DTYPES[1]], [DTYPES[2]], DTYPES]


def rows_of(kind: list[torch.dtype], m: int, shift: int) -> list[Tensor]:
    return [normal(LENGTH, shift, kind[i % len(kind)], i) for i in range(m)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 3])
def test_gramian(kind, shift):
    weight = normal(LENGTH, shift, torch.float32, 99)
    segments = [(3, 100), (101, LENGTH)]
    for m in (*range(1, 9), 11):
        rows = rows_of(kind, m, shift)
        assert_gram_close(ops.gramian(rows), rows)
        found = ops.gramian(rows, weight=weight, segments=segments)
        assert_gram_close(found, rows, weight=weight, segments=segments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 3])
def test_combine(kind, out_dtype, shift):
    rows = rows_of(kind, 3, shift)
    combine_and_compare(normal(LENGTH, shift, out_dtype, 5), rows, [0.5, -1.5, 2.0], [0.5, -1.5, 2.0])


@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
def test_min_norm(m):
    rows = torch.randn(m, 40, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    gram = rows @ rows.T
    weights, status = solve((gram + gram.T) / 2)
    assert status == ops.Status.OK
    assert residual((gram + gram.T) / 2, weights) <= 1e-9
