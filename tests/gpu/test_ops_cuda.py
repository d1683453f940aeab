"""The kernels on a CUDA device against float64 on the CPU. Needs a GPU: tools/gpu_check.sh runs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapo_mega import ops
from gapo_mega.ops import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = 65536  # elements of a block of gramian

# A thread adds at most 256 products (and head, tail) in fp32 before fp64: below 258 * 2^-24 of
# |g_i| |g_j|, with a weight one rounding more.
GRAM_TOLERANCE = 259 * 2.0**-24


def normal(length: int, shift: int, dtype: torch.dtype, seed: int) -> Tensor:
    """On the device, its storage starting ``shift`` elements off an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length + shift, generator=generator).to(dtype).cuda()[shift:]


def on_host(row: Tensor | list[Tensor]) -> Tensor:
    return row.cpu() if isinstance(row, Tensor) else torch.cat([piece.cpu() for piece in row])


def assert_gram_close(found: Tensor, rows: list, **options) -> None:
    host = [on_host(row) for row in rows]
    weight = options.pop("weight", None)
    factors = {} if weight is None else {"weight": on_host(weight)}
    expected = reference.gramian(host, **options, **factors)
    bounded = {name: value.abs() for name, value in factors.items()}
    norms = reference.gramian(host, **options, **bounded).diagonal().sqrt()
    assert found.device.type == "cuda"
    assert bool(((found.cpu() - expected).abs() <= GRAM_TOLERANCE * torch.outer(norms, norms)).all())


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


def test_gramian_repeats_bit_for_bit():
    rows = [normal(5 * CHUNK + 3, 1, torch.bfloat16, seed) for seed in range(8)]
    first = ops.gramian(rows)
    for _ in range(5):
        assert torch.equal(first, ops.gramian(rows))


def test_gramian_on_a_side_stream():
    rows = [normal(4 * CHUNK, 0, torch.float32, seed) for seed in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = ops.gramian(rows)
    stream.synchronize()
    assert_gram_close(found, rows)


def combine_and_compare(out: Tensor | list, rows: list, weights: list[float], given: object) -> None:
    host = [on_host(row) for row in rows]
    expected = torch.empty(host[0].numel(), dtype=torch.float64)
    size = torch.empty_like(expected)
    reference.combine_(expected, host, weights)
    reference.combine_(size, [row.abs() for row in host], [abs(w) for w in weights])
    ops.combine_(out, rows, given)
    found = on_host(out)
    # At most 16 fp32 roundings of the summands, then one to the output's type.
    last = torch.finfo(found.dtype)
    allowed = size * 17 * 2.0**-24 + expected.abs() * last.eps + last.smallest_normal * last.eps
    assert bool(((found.double() - expected).abs() <= allowed).all())


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


def solve(gram: Tensor) -> tuple[Tensor, int]:
    weights = torch.full((gram.shape[0],), 7.0, dtype=torch.float64, device="cuda")
    status = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    ops.min_norm_device(gram.cuda(), weights, status)
    return weights.cpu(), int(status.item())


@pytest.mark.parametrize("m", range(1, 9))
def test_min_norm_equals_the_hosts(m):
    generator = torch.Generator().manual_seed(m)
    for trial in range(20):
        rows = torch.randn(m, 1 + trial % (m + 2), generator=generator, dtype=torch.float64)
        rows = rows * 10 ** (8 * torch.rand(m, 1, generator=generator, dtype=torch.float64))
        gram = rows @ rows.T
        gram = (gram + gram.T) / 2
        weights, status = solve(gram)
        assert status == ops.Status.OK
        assert torch.equal(weights, ops.min_norm(gram))


def test_min_norm_of_a_zero_row():
    weights, status = solve(torch.diag(torch.tensor([4.0, 0.0, 1.0])).double())
    assert (weights.tolist(), status) == ([0.0, 1.0, 0.0], ops.Status.OK)


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


def test_more_rows_than_the_device_solves_are_refused():
    gram = torch.eye(9, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match="9 rows"):
        ops.min_norm_device(gram, torch.zeros(9).double().cuda(), torch.zeros(1, dtype=torch.int32).cuda())


def test_nothing_waits_for_the_device():
    """The whole path, Gram to combination, under torch's own check for synchronising calls."""
    rows = [normal(2 * CHUNK, 0, torch.float32, seed) for seed in range(3)]
    gram = torch.zeros(3, 3, dtype=torch.float64, device="cuda")
    weights = torch.zeros(3, dtype=torch.float64, device="cuda")
    status = torch.zeros(1, dtype=torch.int32, device="cuda")
    ops.gramian(rows, out=gram)  # the plan goes to the device once
    gram.zero_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.gramian(rows, out=gram)
        ops.min_norm_device(gram, weights, status)
        ops.combine_(rows[2], rows, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert status.item() == ops.Status.OK
