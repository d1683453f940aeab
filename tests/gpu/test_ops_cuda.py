"""The kernels on a CUDA device against float64 on the CPU. Needs a GPU: tools/gpu_check.sh runs it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega import aggregation, ops
from gapo_mega.ops import reference
from tests.helpers.aggregators import OnDevice
from tests.helpers.grams import families, residual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = 4096  # elements per chunk of a gramian block

# fp64 sums, in some order, of products that are exact (one rounding with a weight) err by less than n * 2^-53
# of |g_i| |g_j|, and rows here are shorter than 2^20.
GRAM_TOLERANCE = 2 * 2.0 ** (20 - 53)
ROOT_TOLERANCE = 5 * 2.0**-24  # the kernel computes an inverse root in fp32, with five roundings


def normal(length: int, shift: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers on the device, starting ``shift`` elements past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length + shift, generator=generator).to(dtype).cuda()[shift:]


def on_host(row: Tensor | list[Tensor]) -> Tensor:
    return row.cpu() if isinstance(row, Tensor) else torch.cat([piece.cpu() for piece in row])


def assert_gram_close(found: Tensor, rows: list, tolerance: float = GRAM_TOLERANCE, **options) -> None:
    host = [on_host(row) for row in rows]
    weight = options.pop("weight", None)
    factors = {} if weight is None else {"weight": on_host(weight)}
    expected = reference.gramian(host, **options, **factors)
    bounded = {name: value.abs() for name, value in factors.items()}
    norms = reference.gramian(host, **options, **bounded).diagonal().sqrt()
    assert found.device.type == "cuda"
    assert bool(((found.cpu() - expected).abs() <= tolerance * torch.outer(norms, norms)).all())


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


def test_gramian_on_a_side_stream():
    rows = [normal(4 * CHUNK, 0, torch.float32, seed) for seed in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = ops.gramian(rows)
    stream.synchronize()
    assert_gram_close(found, rows)


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


def solve(gram: Tensor, exclude_zero: bool = False) -> tuple[Tensor, int]:
    weights = torch.full((gram.shape[0],), 7.0, dtype=torch.float64, device="cuda")
    status = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    ops.min_norm_(weights, status, gram.cuda(), exclude_zero=exclude_zero)
    return weights.cpu(), int(status.item())


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


METHODS = [
    ("gapo", {"p": 1}),
    ("gapo", {"p": 2, "scale": "mean_norm"}),
    ("mgda", {"scale": "sum_to_one"}),
    ("p_gapo", {"preference": [0.2, 0.3, 0.5]}),
    ("weighted_sum", {}),
]


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_aggregate_on_the_device_is_the_hosts(name, options):
    rows = [normal(2 * CHUNK + 5, 0, torch.float32, seed) for seed in range(3)]
    method = aggregation.build(name, **options)
    copies = [row.clone() for row in rows]
    found = ops.aggregate_(rows[2], rows, None, None, method)
    assert found.ok() and found.weights.device.type == "cuda"
    expected = method(found.gram.cpu())
    # Two math libraries evaluate the same formula.
    torch.testing.assert_close(found.weights.cpu(), expected, rtol=1e-12, atol=0)
    wanted = sum(w * row.double() for w, row in zip(expected.cuda(), copies, strict=True))
    torch.testing.assert_close(rows[2].double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_aggregate_waits_for_nothing(name, options):
    """Run the whole path under torch's own check for synchronising calls."""
    rows = [normal(2 * CHUNK, 0, torch.float32, seed) for seed in range(3)]
    method = aggregation.build(name, **options)
    ops.aggregate_(rows[2], rows, None, None, method)  # copies plan and constants to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.aggregate_(rows[2], rows, None, None, method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.ok()


def test_a_method_with_memory_waits_for_nothing():
    rows = [normal(2 * CHUNK, 0, torch.float32, seed) for seed in range(3)]
    method, expected = OnDevice(), OnDevice()
    method.commit(ops.aggregate_(rows[2], rows, None, None, method))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.aggregate_(rows[2], rows, None, None, method)
        method.commit(found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert method.before.device.type == "cuda"
    expected.before = 2 * (method.before.cpu() - found.gram.cpu().diagonal())  # commit halves the old value
    torch.testing.assert_close(found.weights.cpu(), expected(found.gram.cpu()), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_aggregate_in_a_cuda_graph(name, options):
    rows = [normal(3 * CHUNK, 0, torch.float32, seed) for seed in range(3)]
    segments = [(0, 100), (200, 3 * CHUNK)]
    out = torch.empty_like(rows[0])
    method = aggregation.build(name, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.aggregate_(out, rows, segments, None, method)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.aggregate_(out, rows, segments, None, method)
    for seed in (10, 20):
        for i, row in enumerate(rows):
            row.copy_(normal(3 * CHUNK, 0, torch.float32, seed + i))
        graph.replay()
        replayed = [tensor.clone() for tensor in (out, captured.gram, captured.weights)]
        fresh = torch.empty_like(out)
        again = ops.aggregate_(fresh, rows, segments, None, method)
        for mine, right in zip(replayed, (fresh, again.gram, again.weights), strict=True):
            assert torch.equal(mine, right)
        assert int(captured.status) == ops.Status.OK


def test_aggregate_with_nccl_in_a_cuda_graph(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rows = [normal(CHUNK, 0, torch.float32, seed) for seed in range(2)]
        out = torch.empty_like(rows[0])
        method = aggregation.build("gapo")
        expected = ops.aggregate_(out, rows, None, dist.group.WORLD, method).weights.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.aggregate_(out, rows, None, dist.group.WORLD, method)
        graph.replay()
        assert torch.equal(captured.weights, expected)
    finally:
        dist.destroy_process_group()


def test_nothing_is_allocated_after_warm_up_and_little_before():
    rows = [normal(1 << 22, 0, torch.float32, seed) for seed in range(8)]
    method = aggregation.build("gapo")
    ops.aggregate_(rows[7], rows, None, None, method)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    ops.aggregate_(rows[7], rows, None, None, method)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert torch.cuda.max_memory_allocated() - resident < 1 << 20
