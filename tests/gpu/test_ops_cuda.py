"""The kernels on a CUDA device against float64 on the CPU. Needs a GPU: tools/gpu_check.sh runs it."""

from __future__ import annotations

import pytest
import torch

from gapo_mega import ops
from tests.helpers.grams import families, residual
from tests.helpers.on_gpu import (
    CHUNK,
    DTYPES,
    ROOT_TOLERANCE,
    assert_gram_close,
    combine_and_compare,
    normal,
    solve,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", range(1, 17))
def test_gramian_for_every_number_of_rows(m, dtype):
    rows = [normal(3 * CHUNK + 77, 0, dtype, seed) for seed in range(m)]
    assert_gram_close(ops.gramian(rows), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifts", [(0, 0, 0), (1, 1, 1), (3, 3, 3), (7, 7, 7), (0, 1, 2), (8, 0, 8)])
@pytest.mark.parametrize("length", [0, 1, 3, 7, 8, 255, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_gramian_at_every_alignment(length, shifts, dtype):
    rows = [normal(length, shift, dtype, seed) for seed, shift in enumerate(shifts)]
    assert_gram_close(ops.gramian(rows), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_shift", [0, 1])
def test_gramian_with_pieces_segments_and_weight(dtype, weight_shift):
    lengths = [CHUNK + 13, 0, 5, 3 * CHUNK]
    rows = [[normal(n, 2, dtype, 10 * i + p) for p, n in enumerate(lengths)] for i in range(4)]
    segments = [(0, 3), (9, 9), (100, CHUNK + 15), (CHUNK + 17, CHUNK + 18), (CHUNK + 19, 3 * CHUNK + 1)]
    weight = [normal(n, weight_shift, torch.float32, 99 + p) for p, n in enumerate(lengths)]
    found = ops.gramian(rows, segments=segments, weight=weight)
    assert_gram_close(found, rows, segments=segments, weight=weight)
    assert_gram_close(ops.gramian(rows, segments=[]), rows, segments=[])
    twice = ops.gramian(rows, segments=segments, weight=weight, out=found.clone())
    torch.testing.assert_close(twice, 2 * found, rtol=1e-15, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gramian_when_every_block_has_many_chunks(dtype, weighted):
    rows = [normal(999_983, 0, dtype, seed) for seed in range(8)]
    options = {"weight": normal(999_983, 0, torch.float32, 50)} if weighted else {}
    assert_gram_close(ops.gramian(rows, **options), rows, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gramian_of_thousands_of_segments(dtype):
    rows = [normal(300_000, 0, dtype, seed) for seed in range(2)]
    starts = torch.arange(0, 299_980, 30)
    segments = torch.stack([starts, starts + starts % 31], dim=1)
    assert_gram_close(ops.gramian(rows, segments=segments), rows, segments=segments.tolist())


def test_gramian_of_constant_rows_has_nearly_all_digits():
    rows = [torch.full((1 << 20,), value, device="cuda") for value in (0.1, 1 / 3, -0.7)]
    exact = [float(row[0].double()) for row in rows]
    expected = torch.tensor([[a * b * 2**20 for a in exact] for b in exact]).double()
    torch.testing.assert_close(ops.gramian(rows).cpu(), expected, rtol=1e-11, atol=0)


def test_gramian_repeats_bit_for_bit():
    rows = [normal(1_000_003, 1, torch.bfloat16, seed) for seed in range(8)]
    first = ops.gramian(rows)
    for _ in range(5):
        assert torch.equal(first, ops.gramian(rows))


@pytest.mark.parametrize("m", [2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize("shifts", [(0, 0), (3, 3), (0, 4), (1, 2)])
def test_rows_of_different_types(m, shifts):
    rows = [normal(3 * CHUNK + 77, shifts[i % 2], DTYPES[i % 3], i) for i in range(m)]
    segments = [(3, 100), (CHUNK + 1, 3 * CHUNK)]
    assert_gram_close(ops.gramian(rows), rows)
    assert_gram_close(ops.gramian(rows, segments=segments), rows, segments=segments)
    weights = [0.5 - 0.1 * i for i in range(m)]
    combine_and_compare(torch.empty_like(rows[0]), rows, weights, weights)
    combine_and_compare(rows[1], rows, weights, weights)


@pytest.mark.parametrize("m", [1, 2, 5, 9])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_factors_that_are_inverse_roots(m, mixed, shift):
    rows = [normal(CHUNK + 77, 0, DTYPES[i % 2 if mixed else 0], i) for i in range(m)]
    values = normal(CHUNK + 77, shift, torch.float32, 99)
    torch.pow(10.0, 4 * values, out=values)  # in place, to keep its alignment
    values[7:300] = 0.0
    found = ops.gramian(rows, weight=ops.InverseRoot(values, 0.271, 1e-8))
    expected = torch.where(values == 0, 0.0, 1 / ((values.double() / 0.271).sqrt() + 1e-8))
    assert_gram_close(found, rows, ROOT_TOLERANCE, weight=expected)
    values[0] = torch.nan
    assert not bool(ops.gramian(rows, weight=ops.InverseRoot(values)).isfinite().any())


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifts", [(0, 0, 0), (3, 3, 3), (0, 1, 2)])
def test_combine_into_memory_of_its_own(shifts, dtype, out_dtype):
    for length in (0, 1, 7, 8, 4096, 3 * 8192 + 5):
        rows = [normal(length, shift, dtype, seed) for seed, shift in enumerate(shifts[:2])]
        out = normal(length, shifts[2], out_dtype, 5)
        combine_and_compare(out, rows, [0.25, -1.5], [0.25, -1.5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 8, 16])
def test_combine_in_place_with_weights_on_the_device(m, dtype):
    rows = [[normal(40001, 1, dtype, seed), normal(77, 0, dtype, seed + 50)] for seed in range(m)]
    weights = [0.5 - 0.1 * i for i in range(m)]
    given = torch.tensor(weights, dtype=torch.float64, device="cuda")
    combine_and_compare(rows[-1], rows, weights, given)


def test_a_row_of_weight_zero_is_not_read():
    out = torch.empty(1000, device="cuda")
    rows = [torch.full((1000,), float("nan"), device="cuda"), torch.ones(1000, device="cuda")]
    ops.combine_(out, rows, torch.tensor([0.0, 2.0], dtype=torch.float64, device="cuda"))
    assert bool((out == 2.0).all())


@pytest.mark.parametrize("family", list(families(2, 0)))
@pytest.mark.parametrize("m", range(1, 9))
def test_min_norm_equals_the_hosts(m, family):
    for seed in range(10):
        rows = families(m, seed)[family]
        gram = rows @ rows.T
        gram = (gram + gram.T) / 2
        weights, status = solve(gram)
        assert status == ops.Status.OK
        assert torch.equal(weights, ops.min_norm(gram))


@pytest.mark.parametrize("family", sorted({*families(2, 0)} - {"denormal gram"}))
@pytest.mark.parametrize("m", [9, 12, 16])
def test_min_norm_of_many_rows_meets_the_optimality_conditions(m, family):
    rows = families(m, 1)[family]
    gram = rows @ rows.T
    gram = (gram + gram.T) / 2
    weights, status = solve(gram)
    assert status == ops.Status.OK
    assert residual(gram, weights) <= 1e-9


def test_min_norm_of_a_zero_row():
    gram = torch.diag(torch.tensor([4.0, 0.0, 1.0])).double()
    assert solve(gram)[0].tolist() == [0.0, 1.0, 0.0]
    assert solve(torch.diag(torch.tensor([4.0, 0.0, 0.0])).double())[0].tolist() == [0.0, 0.5, 0.5]
    weights, status = solve(gram, exclude_zero=True)
    assert (weights.tolist(), status) == ([0.2, 0.0, 0.8], ops.Status.OK)
    weights, status = solve(torch.zeros(3, 3).double(), exclude_zero=True)
    assert (weights.tolist(), status) == ([0.0, 0.0, 0.0], ops.Status.OK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_becomes_a_status_and_no_weights(dtype, bad):
    rows = [normal(CHUNK + 9, 0, dtype, seed) for seed in range(3)]
    rows[2][CHUNK + 8] = bad
    gram = ops.gramian(rows)
    assert torch.isfinite(gram.diagonal()).tolist() == [True, True, False]
    weights, status = solve(gram)
    assert (weights.tolist(), status) == ([0.0, 0.0, 0.0], ops.Status.NOT_FINITE)


def test_negative_diagonal_is_a_status():
    weights, status = solve(torch.diag(torch.tensor([4.0, -1.0])).double())
    assert (weights.tolist(), status) == ([0.0, 0.0], ops.Status.NEGATIVE_DIAGONAL)
