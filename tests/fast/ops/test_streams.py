"""gramian and combine_ on the CPU against plain torch in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gapo_mega import ops
from gapo_mega.ops import _native, cpu, portable, reference
from gapo_mega.ops.arguments import parse_out, parse_rows, parse_segments, parse_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _native.instruction_sets()
CHUNK = 1 << 16  # elements that one thread takes at a time

# Products are exact in fp64 (with a weight, one rounding) and n of them are added in some order: below
# n * 2^-53 of sum |a_i a_j|, which Cauchy-Schwarz bounds by |g_i| |g_j|. Rows here are shorter than 2^18; the
# reference adds in another order, with the same bound.
GRAM_TOLERANCE = 2 * 2.0 ** (18 - 53)
# The factor itself is formed in fp32: five roundings.
ROOT_TOLERANCE = 5 * 2.0**-24


def gram_of(rows: list[list[Tensor]], isa: str, threads: int, **options) -> Tensor:
    parsed = parse_rows("rows", rows)
    segments = parse_segments(options.get("segments"), parsed.total)
    weight = parse_weight(options.get("weight"), parsed)
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    cpu.gramian(parsed, segments, weight, out, isa=isa, threads=threads)
    return out


def assert_gram_close(found: Tensor, rows: list[list[Tensor]], **options) -> None:
    expected = reference.gramian(rows, **options)
    # Weights of either sign: the bound is on sums of absolute values.
    weight = options.get("weight")
    bounded = dict(options, weight=[w.abs() for w in weight]) if isinstance(weight, list) else options
    norms = reference.gramian(rows, **bounded).diagonal().sqrt()
    tolerance = ROOT_TOLERANCE if isinstance(weight, ops.InverseRoot) else GRAM_TOLERANCE
    assert bool(((found - expected).abs() <= tolerance * torch.outer(norms, norms)).all())


def shifted(length: int, shift: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random elements whose storage starts ``shift`` elements off an aligned address."""
    return torch.randn(length + shift, generator=generator).to(dtype)[shift:]


@st.composite
def problems(draw):
    m = draw(st.integers(1, 16))
    lengths = draw(st.lists(st.one_of(st.integers(0, 70), st.integers(500, 1600)), min_size=1, max_size=4))
    dtypes = draw(
        st.one_of(st.sampled_from([m * [d] for d in DTYPES]), st.tuples(*m * [st.sampled_from(DTYPES)]))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shifts = [[draw(st.integers(0, 17)) for _ in lengths] for _ in range(m)]
    rows = [
        [shifted(n, s, dtype, generator) for n, s in zip(lengths, row, strict=True)]
        for dtype, row in zip(dtypes, shifts, strict=True)
    ]
    cuts = sorted(draw(st.lists(st.integers(0, sum(lengths)), max_size=12)))
    segments = draw(st.sampled_from([None, list(zip(cuts[::2], cuts[1::2], strict=False))]))
    values = [torch.randn(n + 1, generator=generator)[1:] for n in lengths]
    # Some twenty orders of magnitude about those where eps shows, and zeros; where they begin is kept.
    second = [torch.randn(n + 1, generator=generator)[1:] for n in lengths]
    for v in second:
        torch.pow(10.0, 4 * v - 16, out=v).mul_(v < 1e-12)
    weight = draw(st.sampled_from([None, values, ops.InverseRoot(second, 0.271, 1e-8)]))
    return rows, {"segments": segments, "weight": weight}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [5, 128, 131])
def test_an_inverse_root_does_not_count_zeros_and_shows_nan(isa, length):
    values, rows = torch.zeros(length), [torch.ones(length), torch.full((length,), 2.0).bfloat16()]
    values[length - 2] = 4.0
    for eps, factor in ((0.0, 1 / (4 / 0.25) ** 0.5), (1.0, 1 / 5)):
        weight = ops.InverseRoot(values, correction=0.25, eps=eps)
        found = gram_of([[row] for row in rows], isa, 1, weight=weight)
        expected = factor * torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double()
        torch.testing.assert_close(found, expected, rtol=ROOT_TOLERANCE, atol=0)
    values[0] = torch.nan
    assert not bool(gram_of([[row] for row in rows], isa, 1, weight=weight).isfinite().any())


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from(ISAS), st.integers(1, 3))
def test_gramian_equals_reference(problem, isa, threads):
    rows, options = problem
    assert_gram_close(gram_of(rows, isa, threads, **options), rows, **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", range(1, 17))
def test_gramian_of_several_chunks_is_the_same_for_any_thread_count(m, isa):
    generator = torch.Generator().manual_seed(m)
    length = 2 * CHUNK + 12345
    rows = [[shifted(length // 3, 1, torch.bfloat16, generator) for _ in range(3)] for _ in range(m)]
    segments = [(5, CHUNK - 1), (CHUNK + 1, 2 * CHUNK), (2 * CHUNK, length - 700)]
    one = gram_of(rows, isa, 1, segments=segments)
    assert torch.equal(one, gram_of(rows, isa, 2, segments=segments))
    assert torch.equal(one, gram_of(rows, isa, 3, segments=segments))
    assert torch.equal(one, one.T)
    assert_gram_close(one, rows, segments=segments)


def test_gramian_adds_to_out():
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
    out = torch.full((2, 2), 10.0, dtype=torch.float64)
    assert ops.gramian(rows, out=out) is out
    assert out.tolist() == [[15.0, 11.0], [11.0, 20.0]]


def fsum_gram(rows: list[Tensor]) -> Tensor:
    """Correctly rounded: products of two fp32 numbers are exact in Python's floats, and so is fsum."""
    lists = [row.double().tolist() for row in rows]
    entries = [math.fsum(x * y for x, y in zip(a, b, strict=True)) for a in lists for b in lists]
    return torch.tensor(entries, dtype=torch.float64).view(len(rows), len(rows))


HARD = {
    # What fp32 sums get wrong by 1e-6 and more: every rounding of a constant row points the same way.
    "constant": [torch.full((40_000,), 0.1), torch.full((40_000,), 1 / 3), torch.full((40_000,), -0.7)],
    "one huge element": [torch.cat([torch.tensor([4096.0]), torch.ones(40_000)]), torch.ones(40_001)],
    "cancelling": [torch.tensor([1e8, 1.0, -1e8] * 9_000), torch.tensor([1e8, 1.0, 1e8] * 9_000)],
    "beyond fp32's squares": [
        torch.tensor([3e38, 1e30, -2e25] * 99),
        torch.tensor([1e-40, 1e-30, 1e-38] * 99),
    ],
    "tiny": [torch.full((3_000,), 1e-42), torch.full((3_000,), 1e-25)],
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", list(HARD))
def test_gramian_of_hard_rows_has_nearly_all_digits(name, isa):
    rows = HARD[name]
    expected = fsum_gram(rows)
    norms = expected.diagonal().sqrt()
    error = (gram_of([[row] for row in rows], isa, 2) - expected).abs() / torch.outer(norms, norms)
    # n * 2^-53 at the very most, for any content; fp32 sums would be four million times worse.
    assert float(error.max()) <= 40_001 * 2.0**-53


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_thousands_of_segments(dtype, isa):
    generator = torch.Generator().manual_seed(1)
    rows = [[torch.randn(150_000, generator=generator).to(dtype)] for _ in range(3)]
    starts = torch.arange(0, 149_990, 15)
    segments = torch.stack([starts, starts + torch.randint(0, 16, starts.shape, generator=generator)], dim=1)
    found = gram_of(rows, isa, 2, segments=segments)
    assert_gram_close(found, rows, segments=segments.tolist())
    assert torch.equal(found, gram_of(rows, isa, 1, segments=segments.numpy()))


def test_gramian_of_nothing_is_zero():
    assert ops.gramian([torch.empty(0), torch.empty(0)]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert ops.gramian([[], []]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert ops.gramian([torch.ones(9)], segments=[]).tolist() == [[0.0]]


def test_segments_as_a_tensor():
    row = torch.arange(6.0)
    assert ops.gramian([row], segments=torch.tensor([[0, 2], [4, 5]])).item() == 1.0 + 16.0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_shows_on_the_diagonal(bad, dtype, isa):
    for place in (0, 513, 1000):  # a whole vector, the second block, the remainder
        rows = [[torch.ones(1001, dtype=dtype)] for _ in range(3)]
        rows[1][0][place] = bad
        gram = gram_of(rows, isa, 1)
        assert torch.isfinite(gram.diagonal()).tolist() == [True, False, True]
        with pytest.raises(ValueError, match=r"rows \[1\]"):
            ops.min_norm(gram)


@st.composite
def combinations(draw):
    rows, _ = draw(problems())
    out_dtype = draw(st.sampled_from(DTYPES))
    target = draw(st.integers(-1, len(rows) - 1))  # -1: memory of its own
    weights = draw(
        st.lists(st.one_of(st.just(0.0), st.floats(-4, 4, width=32)), min_size=len(rows), max_size=len(rows))
    )
    return rows, out_dtype, target, weights


@settings(max_examples=120, deadline=None)
@given(combinations(), st.sampled_from(ISAS), st.integers(1, 3))
def test_combine_equals_reference(problem, isa, threads):
    rows, out_dtype, target, weights = problem
    expected = [torch.empty(p.numel(), dtype=torch.float64) for p in rows[0]]
    bound = [torch.empty(p.numel(), dtype=torch.float64) for p in rows[0]]
    reference.combine_(expected, rows, weights)
    reference.combine_(bound, [[p.abs() for p in row] for row in rows], [abs(w) for w in weights])
    out = rows[target] if target >= 0 else [torch.full_like(p, 7.0, dtype=out_dtype) for p in rows[0]]
    parsed = parse_rows("rows", rows)
    cpu.combine(parse_out(out, parsed), parsed, weights, isa=isa, threads=threads)
    # At most 16 fp32 roundings of the summands, then one to the output's type.
    last = torch.finfo(rows[target][0].dtype if target >= 0 else out_dtype)
    for found, right, size in zip(out, expected, bound, strict=True):
        allowed = size * 17 * 2.0**-24 + right.abs() * last.eps + last.smallest_normal * last.eps
        assert bool(((found.double() - right).abs() <= allowed).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_sixteen_bits_is_torchs(dtype, isa):
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), generator=torch.Generator().manual_seed(3))
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e-8, 2.0**-14, 2.0**-24, 2.0**-25, float("inf"), 3.4e38]
    # Half-way cases of both types, and everything between.
    halves = torch.arange(0, 1 << 16, dtype=torch.int32) * 65536 + 32768
    wide = torch.cat([bits.int().view(torch.float32), halves.view(torch.float32), torch.tensor(special)])
    out = torch.empty(wide.numel(), dtype=dtype)
    rows = parse_rows("rows", [wide])
    cpu.combine(parse_out(out, rows), rows, [1.0], isa=isa, threads=1)
    expected = wide.to(dtype)
    finite = ~torch.isnan(expected)
    assert torch.equal(torch.isnan(out), ~finite)
    assert torch.equal(out[finite], expected[finite])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact_for_every_value(dtype, isa):
    narrow = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(narrow.numel())
    rows = parse_rows("rows", [narrow])
    cpu.combine(parse_out(out, rows), rows, [1.0], isa=isa, threads=1)
    torch.testing.assert_close(out, narrow.float(), rtol=0, atol=0, equal_nan=True)


def test_a_row_of_weight_zero_is_not_read():
    out = torch.empty(40)
    ops.combine_(out, [torch.full((40,), float("nan")), torch.ones(40)], [0.0, 2.0])
    assert out.tolist() == [2.0] * 40
    ops.combine_(out, [torch.full((40,), float("nan"))], [0.0])
    assert out.tolist() == [0.0] * 40


def test_combine_returns_out_and_takes_tensors():
    out = torch.empty(3, dtype=torch.bfloat16)
    rows = [torch.ones(3), torch.full((3,), 2.0)]
    assert ops.combine_(out, rows, torch.tensor([1.0, 0.5], dtype=torch.float64)) is out
    assert out.tolist() == [2.0] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_portable_equals_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs get without nvcc: float64 sums in stretches, so only their order differs."""
    monkeypatch.setattr(portable, "STRETCH", 7)
    generator = torch.Generator().manual_seed(3)
    rows = [[torch.randn(n, generator=generator).to(dtype) for n in (23, 0, 40)] for _ in range(3)]
    rows[0] = [piece.float() for piece in rows[0]]
    plain = [torch.rand(n, generator=generator) for n in (23, 0, 40)]
    parsed = parse_rows("rows", rows)
    for weight in (None, plain, ops.InverseRoot(plain, 0.5, 1e-3)):
        for segments in (None, np.array([(2, 9), (15, 30), (62, 63)])):
            out = torch.zeros(3, 3, dtype=torch.float64)
            portable.gramian(parsed, segments, parse_weight(weight, parsed), out)
            expected = reference.gramian(rows, segments=segments, weight=weight)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    factors = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    target = [piece.clone() for piece in rows[2]]
    expected_pieces = [0.5 * a.double() - 2.0 * c.double() for a, c in zip(rows[0], rows[2], strict=True)]
    portable.combine(parse_out(target, parsed), parsed, factors)
    # One rounding to the element type (8 bits of bf16) after fp32 sums.
    tolerance = 2 * torch.finfo(dtype).eps
    for found, wanted in zip(target, expected_pieces, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
