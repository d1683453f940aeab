"""The CUDA kernels' sources on the CPU, thread by thread: indices, alignment, barriers.

tests/helpers/cuda_emulation has the emulator. What only a device has (its compiler, streams, its own memory)
is left to tests/gpu.
"""

from __future__ import annotations

import re
import shutil
import sys

import pytest
import torch
from torch import Tensor

from gapo_mega.ops import Status
from tests.helpers.cuda_emulation.build import compiler
from tests.helpers.cuda_emulation.comparison import assert_gram_close, combine_and_compare, normal
from tests.helpers.cuda_emulation.extension import DTYPES, SCHEDULES, Emulated
from tests.helpers.cuda_emulation.memory import GuardedMemory
from tests.helpers.grams import families, residual

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator uses Linux's memory and contexts"),
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="no C++ compiler"),
]

ROOT_TOLERANCE = 5 * 2.0**-24  # an inverse root is formed in fp32: five roundings


# ---- The emulator itself: it finds what it is there for ----------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "barrier_in_a_branch",
            r"block \(0, 0, 0\): thread \(0, 0, 0\) waits in __syncthreads .*has returned",
        ),
        ("different_barriers", r"thread \(0, 0, 0\) waits in __syncthreads .*but .*waits in __syncthreads"),
        ("shuffle_in_a_branch", "waits in a shuffle of mask 0xffffffff .*waits in __syncthreads"),
        ("shuffle_from_a_returned_lane", "waits in a shuffle .*lane 16, which takes no part"),
        ("shuffle_outside_the_mask", "a lane outside its own mask at faults.cu"),
        ("misaligned_load", "misaligned or null address at faults.cu"),
        ("misaligned_store", "misaligned or null address at faults.cu"),
        ("index_outside_shared_memory", r"thread \(63, 0, 0\): index outside an array at faults.cu"),
        ("null_pointer", "misaligned or null address at faults.cu"),
        ("unmapped_memory", "illegal memory access"),
        ("deep_recursion", "stack overflow"),
        ("no_blocks", "^invalid configuration argument$"),
        ("too_many_threads", "^invalid configuration argument$"),
        ("too_many_threads_in_all", "^invalid configuration argument$"),
    ],
)
def test_the_emulator_finds(emulated, case, said, schedule):
    emulated.configure(schedule)
    out = emulated.memory.place(torch.zeros(64, dtype=torch.int32), written=True)
    assert re.search(said, emulated.case(case, out))
    assert emulated.case("exchange", out) == ""  # and the next launch is as if nothing had been


def test_memory_shows_what_is_written_beside_it(emulated):
    """The case writes 64 numbers."""
    for length, shown in ((48, None), (60, "written behind the end"), (64, "input overwritten")):
        memory = GuardedMemory()
        said = emulated.case("exchange", memory.place(torch.zeros(length, dtype=torch.int32)))
        if shown is None:
            assert "illegal memory access" in said
        else:
            assert said == ""
            with pytest.raises(AssertionError, match=shown):
                memory.check()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warp_functions_and_threads_in_three_dimensions(emulated, schedule):
    emulated.configure(schedule)
    out = emulated.memory.place(torch.zeros(64, dtype=torch.int32), written=True)
    assert emulated.case("warp_functions", out) == ""
    assert out.tolist() == 32 * [sum(range(32))] + 32 * [sum(range(32, 64))]


def test_a_missing_barrier_shows_in_some_order(emulated):
    def results(case: str) -> list[list[int]]:
        found = []
        for schedule in SCHEDULES:
            emulated.configure(schedule)
            out = emulated.memory.place(torch.zeros(64, dtype=torch.int32), written=True)
            assert emulated.case(case, out) == ""
            found.append(out.tolist())
        return found

    exchanged = [(i - 1) % 64 + 100 * ((i + 1) % 64) for i in range(64)]
    assert results("exchange") == 3 * [exchanged]
    assert exchanged not in results("exchange_without_barrier")
    # Right in ascending order only.
    assert [found == list(range(-1, 63)) for found in results("take_from_left_without_barrier")] == [
        True,
        False,
        False,
    ]


# ---- Plan and Gram ----------------------------------------------------------------------------------


def test_plan_covers_every_segment_once(emulated):
    chunk = emulated.chunk
    lengths = [10, 0, 3 * chunk, 5]
    runs = emulated.plan(lengths, [(2, 12), (chunk, 3 * chunk + 13)])
    assert runs == [(2, 10, 0), (0, 2, 1), (chunk - 10, 3 * chunk, 2), (0, 3, 5)]
    assert emulated.plan(lengths, None) == [(0, 10, 0), (0, 3 * chunk, 1), (0, 5, 4)]
    assert emulated.plan([0], None) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", range(1, 17))
def test_gramian_for_every_number_of_rows(emulated, m, dtype, schedule):
    emulated.configure(schedule, multiprocessors=1)
    length = emulated.chunk + 77
    rows = [[emulated.memory.place(normal(length, dtype, seed))] for seed in range(m)]
    assert_gram_close(emulated.gramian(rows), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shifts", [(0, 0, 0), (1, 1, 1), (3, 3, 3), (7, 7, 7), (0, 1, 2), (8, 0, 8), (0, 4, 0)]
)
def test_gramian_at_every_alignment(emulated, shifts, dtype):
    chunk = emulated.chunk
    emulated.configure("random")
    for length in (0, 1, 3, 7, 8, 9, 255, chunk - 1, chunk, chunk + 1, 2 * chunk + 5):
        rows = [
            [emulated.memory.place(normal(length, dtype, seed), shift)] for seed, shift in enumerate(shifts)
        ]
        assert_gram_close(emulated.gramian(rows), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_shift", [0, 1, 2])
@pytest.mark.parametrize("m", [4, 9])
def test_gramian_with_pieces_segments_and_weight(emulated, m, weight_shift, dtype):
    emulated.configure("random")
    chunk, place = emulated.chunk, emulated.memory.place
    lengths = [chunk + 13, 0, 5, 2 * chunk]
    rows = [[place(normal(n, dtype, 10 * i + p), 2) for p, n in enumerate(lengths)] for i in range(m)]
    weight = [place(normal(n, torch.float32, 999 + p), weight_shift) for p, n in enumerate(lengths)]
    segments = [(0, 3), (9, 9), (100, chunk + 15), (chunk + 17, chunk + 18), (chunk + 19, 3 * chunk + 1)]
    for chosen in (segments, None, []):
        found = emulated.gramian(rows, chosen, weight)
        assert_gram_close(found, rows, segments=chosen, weight=weight)
    assert_gram_close(emulated.gramian(rows, segments), rows, segments=segments)
    once = emulated.gramian(rows, segments, weight)
    twice = emulated.gramian(rows, segments, weight, out=once)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-15, atol=0)


# (type, elements past an aligned address) of every row; a float's border of 8 elements is a multiple of 4's.
MIXED = {
    "fp32 first": [(0, 0), (1, 0), (1, 0)],
    "fp32 last, shifted": [(1, 3), (2, 3), (0, 3)],
    "aligned to 4 elements": [(1, 4), (0, 0), (2, 8)],
    "not aligned": [(1, 1), (0, 2), (2, 3)],
    "nine": [(i % 3, 5) for i in range(9)],
    "sixteen": [(i % 2, 0) for i in range(16)],
}


def mixed_rows(emulated: Emulated, kinds: list[tuple[int, int]], lengths: list[int]) -> list[list[Tensor]]:
    return [
        [
            emulated.memory.place(normal(n, DTYPES[code], 10 * i + p), shift, written=i == 0)
            for p, n in enumerate(lengths)
        ]
        for i, (code, shift) in enumerate(kinds)
    ]


@pytest.mark.parametrize("kinds", MIXED)
def test_gramian_of_rows_of_different_types(emulated, kinds):
    emulated.configure("random")
    lengths = [2 * emulated.chunk + 13, 0, 5, 77]
    rows = mixed_rows(emulated, MIXED[kinds], lengths)
    weight = [emulated.memory.place(normal(n, torch.float32, p), 1) for p, n in enumerate(lengths)]
    segments = [(0, 3), (100, emulated.chunk + 15), (emulated.chunk + 19, 2 * emulated.chunk + 50)]
    assert_gram_close(emulated.gramian(rows), rows)
    found = emulated.gramian(rows, segments, weight)
    assert_gram_close(found, rows, segments=segments, weight=weight)


@pytest.mark.parametrize("kinds", MIXED)
def test_combine_rows_of_different_types(emulated, kinds):
    emulated.configure("random")
    lengths = [2 * 8192 + 5, 0, 77]
    weights = [0.25 - 0.5 * i for i in range(len(MIXED[kinds]))]
    for out_dtype in DTYPES:
        rows = mixed_rows(emulated, MIXED[kinds], lengths)
        out = [emulated.memory.place(torch.zeros(n, dtype=out_dtype), written=True) for n in lengths]
        combine_and_compare(emulated, out, rows, weights)
    combine_and_compare(emulated, rows[0], rows, weights)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("m", [1, 2, 5, 9])
def test_factors_that_are_inverse_roots(emulated, m, shift):
    emulated.configure("random")
    lengths = [emulated.chunk + 13, 5]
    rows = [
        [emulated.memory.place(normal(n, DTYPES[i % 2], 10 * i + p)) for p, n in enumerate(lengths)]
        for i in range(m)
    ]
    second = [10.0 ** (4 * normal(n, torch.float32, 99 + p)) for p, n in enumerate(lengths)]
    second[0][7:300] = 0.0
    values = [emulated.memory.place(v, shift) for v in second]
    found = emulated.gramian(rows, None, values, (0.271**-0.5, 1e-8))
    expected = [torch.where(v == 0, 0.0, 1 / ((v.double() / 0.271).sqrt() + 1e-8)) for v in second]
    assert_gram_close(found, rows, ROOT_TOLERANCE, weight=expected)
    broken = [emulated.memory.place(torch.full((n,), torch.nan)) for n in lengths]
    assert not bool(emulated.gramian(rows, None, broken, (1.0, 0.0)).isfinite().any())


def test_elements_that_are_not_selected_are_not_used(emulated):
    row = normal(300, torch.float32, 1)
    row[100:103] = torch.nan
    rows = [[emulated.memory.place(row, shift)] for shift in (1, 1, 2)]
    for aligned in (rows[:2], rows):
        found = emulated.gramian(aligned, [(3, 100), (103, 300)])
        assert bool(torch.isfinite(found).all())


# A multiprocessor takes a handful of blocks: with one of them, blocks go round several times.
@pytest.mark.parametrize("m", [1, 3, 8, 11])
def test_gramian_on_devices_of_several_sizes(emulated, m):
    rows = [[emulated.memory.place(normal(11 * emulated.chunk + 3, torch.bfloat16, i))] for i in range(m)]
    for multiprocessors in (1, 3):
        found = []
        for schedule in ("ascending", "random"):
            emulated.configure(schedule, multiprocessors)
            found.append(emulated.gramian(rows))
        assert_gram_close(found[0], rows)
        assert torch.equal(found[0], found[0].T)
        assert all(torch.equal(found[0], other) for other in found)


# ---- Combination ------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifts", [(0, 0, 0), (3, 3, 3), (5, 5, 5), (4, 4, 0), (0, 1, 2)])
def test_combine_into_memory_of_its_own(emulated, shifts, dtype, out_dtype):
    emulated.configure("random")
    place = emulated.memory.place
    for length in (0, 1, 7, 8, 9, 31, 2047, 2048, 4095, 4096, 8192, 2 * 8192 + 5):
        rows = [[place(normal(length, dtype, i), shift)] for i, shift in enumerate(shifts[:2])]
        out = [place(torch.full((length,), torch.nan, dtype=out_dtype), shifts[2], written=True)]
        combine_and_compare(emulated, out, rows, [0.25, -1.5])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 8, 16])
def test_combine_in_place_and_in_pieces(emulated, m, dtype, schedule):
    emulated.configure(schedule)
    place = emulated.memory.place
    lengths, shifts = [9001, 0, 77], [1, 0, 2]
    rows = [
        [
            place(normal(n, dtype, 3 * i + p), shift, written=i == m - 1)
            for p, (n, shift) in enumerate(zip(lengths, shifts, strict=True))
        ]
        for i in range(m)
    ]
    combine_and_compare(emulated, rows[-1], rows, [0.5 - 0.1 * i for i in range(m)])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_weight_zero_is_not_read(emulated, dtype, shift):
    ones = emulated.memory.place(torch.ones(5000, dtype=dtype))
    out = emulated.memory.place(torch.zeros(5000, dtype=dtype), shift, written=True)
    nothing = torch.empty(5000, dtype=dtype, device="meta")  # its address is 0
    for weights, expected in (([0.0, 2.0], 2.0), ([0.0, 0.0], 0.0)):
        emulated.combine([out], [[nothing], [ones]], weights)
        assert bool((out == expected).all())


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_conversions_are_torchs(emulated, dtype):
    place = emulated.memory.place
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = place(torch.zeros(every.numel()), written=True)
    emulated.combine([wide], [[place(every)]], [1.0])
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    # All values of 16 bits, the middles between them, what lies next to either, and any bits.
    finite = every.float()[torch.isfinite(every)].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    near = [torch.nextafter(x, sign * infinity) for x in (finite, middles) for sign in (-1, 1)]
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
    given = torch.cat([finite, middles, *near, bits.to(torch.int32).view(torch.float32)])
    narrow = place(torch.zeros(given.numel(), dtype=dtype), written=True)
    emulated.combine([narrow], [[place(given)]], [1.0])
    # Of two zeros the sum's sign is that of 0 + x.
    torch.testing.assert_close(narrow, given.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- Minimum-norm point -----------------------------------------------------------------------------


def gram_of(rows: Tensor) -> Tensor:
    gram = rows @ rows.T
    return (gram + gram.T) / 2


@pytest.mark.parametrize("exclude_zero", [False, True])
@pytest.mark.parametrize("family", list(families(2, 0)))
@pytest.mark.parametrize("m", range(1, 9))
def test_min_norm_equals_the_hosts(emulated, m, family, exclude_zero):
    for seed, schedule in enumerate(SCHEDULES):
        emulated.configure(schedule)
        gram = gram_of(families(m, seed)[family])
        weights, status = emulated.min_norm(gram, exclude_zero)
        expected, expected_status = emulated.host_min_norm(gram, exclude_zero)
        assert status == expected_status == Status.OK
        if family == "denormal gram":
            # Rounded to denormals it may be indefinite and have several stationary points.
            assert residual(gram, weights) <= 1e-9
        else:
            assert torch.equal(weights, expected), gram


@pytest.mark.parametrize("family", list(families(2, 0)))
@pytest.mark.parametrize("m", [9, 12, 16])
def test_min_norm_of_many_rows(emulated, m, family):
    """One thread does what the host does."""
    gram = gram_of(families(m, 1)[family])
    weights, status = emulated.min_norm(gram)
    expected, expected_status = emulated.host_min_norm(gram)
    assert status == expected_status == Status.OK
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("m", [3, 12])
def test_min_norm_of_zero_rows(emulated, m):
    gram = torch.zeros(m, m, dtype=torch.float64)
    assert (emulated.min_norm(gram)[0].tolist(), emulated.min_norm(gram)[1]) == (m * [1 / m], 0)
    assert emulated.min_norm(gram, exclude_zero=True)[0].tolist() == m * [0.0]
    gram[1, 1] = 4.0
    gram[2, 2] = 4.0
    share = 1 / (m - 2)
    assert emulated.min_norm(gram)[0].tolist() == [share, 0.0, 0.0] + (m - 3) * [share]
    assert emulated.min_norm(gram, exclude_zero=True)[0].tolist() == [0.0, 0.5, 0.5] + (m - 3) * [0.0]


@pytest.mark.parametrize("m", [2, 8, 9, 16])
@pytest.mark.parametrize(
    ("bad", "expected"),
    [(torch.nan, Status.NOT_FINITE), (torch.inf, Status.NOT_FINITE), (-1.0, Status.NEGATIVE_DIAGONAL)],
)
def test_min_norm_of_what_is_no_gram(emulated, bad, expected, m):
    gram = torch.eye(m, dtype=torch.float64)
    gram[m - 1, m - 1] = bad
    weights, status = emulated.min_norm(gram)
    assert (weights.tolist(), status) == (m * [0.0], expected)
