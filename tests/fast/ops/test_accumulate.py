"""accumulate_ against float64, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gapo_mega import ops
from gapo_mega.ops import _native, portable
from gapo_mega.ops.cpu import ISA_VARIABLE

ISAS = _native.instruction_sets()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARED = 1 << 17  # elements of a row that several threads share
UNTOUCHED = 7.0


class Problem:
    """Rows and terms that begin at odd addresses, with other memory between them."""

    def __init__(
        self,
        m: int,
        count: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        shift: int = 0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._memory = torch.full((m, length + shift + 3), UNTOUCHED)
        self.rows = self._memory[:, shift : shift + length]
        self.rows.copy_(torch.randn(m, length, generator=generator))
        self.coefficients = torch.randn(m, count, generator=generator)
        places = torch.randn(count, length + shift + 5, generator=generator).to(dtype)
        self.terms = places[:, shift + 1 : shift + 1 + length]

    @property
    def between(self) -> Tensor:
        width = self.rows.shape[1]
        start = self._memory.shape[1] - 3 - width
        return torch.cat([self._memory[:, :start], self._memory[:, start + width :]], dim=1)

    def expected(self, overwrite: bool) -> tuple[Tensor, Tensor]:
        """The rows afterwards and the largest error of every element, in float64."""
        old = torch.zeros(self.rows.shape).double() if overwrite else self.rows.double()
        coefficients, terms = self.coefficients.double(), self.terms.double()
        # Two roundings a term (one where multiply-add is fused) and one for the old element.
        unit = (2 * len(terms) + 1) * 2.0**-24
        return old + coefficients @ terms, unit * (old.abs() + coefficients.abs() @ terms.abs())


@st.composite
def problems(draw: Any) -> Problem:
    return Problem(
        draw(st.integers(1, 16)),
        draw(st.integers(0, 40)),
        draw(st.one_of(st.integers(1, 140), st.integers(250, 1100))),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 17)),
        draw(st.integers(0, 2**31)),
    )


def assert_adds(problem: Problem, overwrite: bool) -> None:
    expected, error = problem.expected(overwrite)
    if overwrite:
        problem.rows.fill_(torch.nan)
    # As the engine has them: all rows but the last in one matrix.
    tensors = [problem.rows[:-1], problem.rows[-1]]
    ops.accumulate_(tensors, problem.coefficients, problem.terms, overwrite=overwrite)
    assert bool(((problem.rows.double() - expected).abs() <= error).all())
    assert bool((problem.between == UNTOUCHED).all())


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(problem=problems(), overwrite=st.booleans())
def test_any_rows_and_terms(isa: str, problem: Problem, overwrite: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ISA_VARIABLE, isa)
        assert_adds(problem, overwrite)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", range(1, 17))
def test_every_number_of_rows(monkeypatch: pytest.MonkeyPatch, isa: str, m: int) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    for overwrite in (False, True):
        assert_adds(Problem(m, 8, 3 * 256 + 77, shift=m), overwrite)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        problem = Problem(3, 5, SHARED + 101, dtype, shift=3)
        torch.set_num_threads(threads)
        try:
            assert_adds(problem, overwrite=False)
        finally:
            torch.set_num_threads(before)
        found.append(problem.rows)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_of_gpus_adds_the_same(m: int, dtype: torch.dtype, overwrite: bool) -> None:
    problem = Problem(m, 6, 130, dtype, shift=1)
    expected, error = problem.expected(overwrite)
    if overwrite:
        problem.rows.fill_(torch.nan)
    tensors = [problem.rows[:-1], problem.rows[-1]]
    portable.accumulate(tensors, problem.coefficients, problem.terms, overwrite)
    assert bool(((problem.rows.double() - expected).abs() <= error).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [1, 5, 40])  # the last element is in a part of a vector, or in a whole one
def test_not_a_number_shows_in_its_column_of_every_row(
    monkeypatch: pytest.MonkeyPatch, isa: str, length: int
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    terms = torch.ones(2, length)
    terms[1, -1] = torch.inf
    rows = torch.zeros(3, length)
    ops.accumulate_([rows], torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, -1.0]]), terms)
    assert rows[0, -1] == torch.inf and rows[2, -1] == -torch.inf
    assert bool(rows[1, -1].isnan())  # 0 times infinity, as a product of matrices has it
    assert bool(rows[:, :-1].isfinite().all())


def test_memory_order_of_coefficients_and_shared_terms() -> None:
    coefficients = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    rows = torch.zeros(2, 4)
    ops.accumulate_([rows], coefficients.t().contiguous().t(), torch.ones(1, 4).expand(3, 4))
    assert rows.tolist() == [[6.0] * 4, [15.0] * 4]


def test_rows_and_terms_may_take_turns_in_memory() -> None:
    memory = torch.ones(6, 4)
    ops.accumulate_([memory[::3], memory[1::3]], torch.ones(4, 2), memory[2::3])
    assert memory.tolist() == [[3.0] * 4, [3.0] * 4, [1.0] * 4] * 2


def test_no_elements_and_no_rows_in_a_tensor() -> None:
    ops.accumulate_([torch.ones(2, 0)], torch.ones(2, 3), torch.ones(3, 0))
    row = torch.ones(4)
    ops.accumulate_([torch.ones(0, 4), row], torch.ones(1, 1), torch.ones(1, 4))
    assert row.tolist() == [2.0] * 4


ROW, MATRIX = torch.ones(4), torch.ones(2, 4)
FLOATS = torch.ones(3, 5)
REFUSED: dict[str, tuple[list[Any], Any, Any, str]] = {
    "no rows": ([], torch.ones(0, 2), MATRIX, "rows: found 0 rows, accepted: 1 to 16"),
    "many rows": ([torch.ones(17, 4)], torch.ones(17, 2), MATRIX, "rows: found 17 rows, accepted: 1 to 16"),
    "long row": (
        [ROW, torch.ones(5)],
        MATRIX[:, :2],
        MATRIX,
        r"rows\[1\]: found .*\(5,\).*\[4\] or \[K, 4\]",
    ),
    "cube": ([torch.ones(1, 1, 4)], torch.ones(1, 2), MATRIX, r"rows\[0\]: found .* shape \(1, 1, 4\)"),
    "bf16 row": ([ROW.bfloat16()], torch.ones(1, 2), MATRIX, r"rows\[0\]: found torch.bfloat16"),
    "list": ([[1.0] * 4], torch.ones(1, 2), MATRIX, r"rows\[0\]: found list, accepted: torch.Tensor"),
    "columns": ([torch.ones(4, 2).t()], torch.ones(2, 2), MATRIX, r"rows\[0\]: found strides \(1, 2\)"),
    "other device": (
        [torch.ones(4, device="meta")],
        torch.ones(1, 2),
        MATRIX,
        r"rows\[0\]: found .* on meta",
    ),
    "double terms": ([ROW.clone()], torch.ones(1, 2), MATRIX.double(), "terms: found torch.float64"),
    "flat terms": ([ROW.clone()], torch.ones(1, 1), ROW, r"terms: found .* shape \(4,\).*\[B, N\]"),
    "meta": ([ROW.clone()], torch.ones(1, 2), MATRIX.to("meta"), "terms: found .* on meta"),
    "term columns": ([ROW.clone()], torch.ones(1, 2), torch.ones(4, 2).t(), r"terms: found strides \(1, 2\)"),
    "sparse": (
        [ROW.clone()],
        torch.ones(1, 2),
        MATRIX.to_sparse(),
        "terms: found the layout torch.sparse_coo",
    ),
    "negated": ([ROW.clone()], torch.ones(1, 2), torch._neg_view(MATRIX), "terms: found a view that negates"),
    "coefficients": (
        [ROW.clone()],
        torch.ones(2, 2),
        MATRIX,
        r"coefficients: found .*\(2, 2\) on cpu, accepted: .*\(1, 2\)",
    ),
    "double": ([ROW.clone()], torch.ones(1, 2).double(), MATRIX, "coefficients: found torch.float64"),
    "same row": ([ROW, ROW], torch.ones(2, 2), MATRIX, "rows: found rows that overlap"),
    "expanded rows": ([ROW.expand(2, 4)], torch.ones(2, 2), MATRIX, "rows: found rows that overlap"),
    "rows that meet": (
        [FLOATS.view(-1)[:4], FLOATS.view(-1)[3:7]],
        torch.ones(2, 2),
        MATRIX,
        "rows: found rows that overlap",
    ),
    "own terms": ([FLOATS[1, :4]], torch.ones(1, 3), FLOATS[:, 1:], "terms: row 1 overlaps rows"),
    "own coefficients": ([FLOATS[0, :3]], FLOATS[:1, 2:4], MATRIX[:, :3], "coefficients: overlaps rows"),
    "terms with grad": (
        [ROW.clone()],
        torch.ones(1, 2),
        torch.ones(2, 4, requires_grad=True),
        "terms: found a tensor that requires grad",
    ),
    "coefficients with grad": (
        [ROW.clone()],
        torch.ones(1, 2, requires_grad=True),
        MATRIX,
        "coefficients: found a tensor that requires grad",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    rows, coefficients, terms, message = REFUSED[case]
    with pytest.raises(ValueError, match=rf"^{message}"):
        ops.accumulate_(rows, coefficients, terms)
    assert bool((FLOATS == 1).all()) and bool((ROW == 1).all())
