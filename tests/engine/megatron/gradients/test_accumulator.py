"""Products of weight gradients, in both forms, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gapo_mega.engine.megatron.gradients.accumulator import Accumulator, is_short
from gapo_mega.engine.megatron.gradients.expert_rows import by_expert
from gapo_mega.engine.megatron.gradients.row_sequences import RowSequences
from gapo_mega.engine.megatron.gradients.sharers import Sharers

SEQUENCES, WIDTH, OUT = 5, 12, 40


class Rows:
    """What the accumulator reads of ``WholeRows``, for one parameter."""

    def __init__(self, parameter: nn.Parameter, count: int) -> None:
        self.parameters = [parameter]
        self.memory = torch.full((count, parameter.numel()), torch.nan)

    def of(self, parameter: nn.Parameter) -> Tensor:
        return self.memory


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("form", ["linear", "linear_by_row", "linear_by_tile"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_both_forms_are_the_sum_over_sequences(
    rows: int, form: str, dtype: torch.dtype, error: float
) -> None:
    """Two additions, of which the first overwrites. bf16 rounds factors and products by 2^-9 each."""
    generator = torch.Generator().manual_seed(rows)
    weight = nn.Parameter(torch.empty(OUT, WIDTH), requires_grad=False)
    weight.main_grad = torch.full((OUT, WIDTH), torch.nan)  # type: ignore[attr-defined]
    memory = Rows(weight, rows - 1)
    accumulator = Accumulator(memory)  # type: ignore[arg-type]
    accumulator.start()
    expected = torch.zeros(rows, OUT, WIDTH, dtype=torch.float64)
    for addition, length in enumerate((3, 70)):
        coefficients_MB = torch.randn(rows, SEQUENCES, generator=generator)
        input_SBI = torch.randn(length, SEQUENCES, WIDTH, generator=generator).to(dtype)
        grad_SBO = torch.randn(length, SEQUENCES, OUT, generator=generator).to(dtype)
        accumulator.take(coefficients_MB, torch.device("cpu"))
        if form == "linear":
            accumulator.linear(weight, input_SBI, grad_SBO)
        else:
            getattr(accumulator, form)(weight, input_SBI, grad_SBO, float(addition))
        expected += torch.einsum(
            "mb,sbo,sbi->moi", coefficients_MB.double(), grad_SBO.double(), input_SBI.double()
        )
    found = torch.cat([memory.memory, weight.main_grad.view(1, -1)]).view(rows, OUT, WIDTH)  # type: ignore[attr-defined]
    assert (found - expected).norm() <= error * expected.norm()


# The rows of 5 sequences, one of them absent: together, and not.
TOGETHER = torch.tensor([0, 1, 1, 1, 3, 3, 4, 4, 4, 4])
APART = torch.tensor([4, 0, 1, 1, 3, 4, 1, 3, 4, 4])


@pytest.mark.parametrize("numbers_R", [TOGETHER, APART], ids=["together", "apart"])
@pytest.mark.parametrize("form", ["linear", "linear_by_row", "packed_by_tile", "over_positions"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_packed_rows_are_the_sum_over_sequences(
    numbers_R: Tensor, form: str, dtype: torch.dtype, error: float
) -> None:
    """Of rows that are all positions, and of some that a module names; the first addition overwrites."""
    rows, generator = 3, torch.Generator().manual_seed(4)
    sequences = RowSequences.of(numbers_R)
    if form == "packed_by_tile" and sequences.runs is None:
        pytest.skip("tiles are of rows that are together")
    inputs = 1 if form == "over_positions" else WIDTH
    weight = nn.Parameter(torch.empty(OUT, inputs), requires_grad=False)
    weight.main_grad = torch.full((OUT, inputs), torch.nan)  # type: ignore[attr-defined]
    memory = Rows(weight, rows - 1)
    accumulator = Accumulator(memory)  # type: ignore[arg-type]
    accumulator.start()
    expected = torch.zeros(rows, OUT, inputs, dtype=torch.float64)
    for addition, named in enumerate((sequences, None)):
        coefficients_MB = torch.randn(rows, SEQUENCES, generator=generator)
        input_S1I = torch.randn(len(numbers_R), 1, inputs, generator=generator).to(dtype)
        grad_S1O = torch.randn(len(numbers_R), 1, OUT, generator=generator).to(dtype)
        numbers_S = numbers_R if named is None else torch.zeros(99, dtype=torch.int64)
        accumulator.take_positions(numbers_S, torch.device("cpu"))
        accumulator.take(coefficients_MB, torch.device("cpu"))
        if form == "over_positions":
            input_S1I = torch.ones_like(input_S1I)
            accumulator.over_positions(weight, grad_S1O, named)
        elif form == "linear":
            accumulator.linear(weight, input_S1I, grad_S1O, named)
        else:
            getattr(accumulator, form)(weight, input_S1I, grad_S1O, float(addition), sequences)
        coefficients_MS = coefficients_MB.double()[:, numbers_R]
        expected += torch.einsum(
            "ms,so,si->moi", coefficients_MS, grad_S1O[:, 0].double(), input_S1I[:, 0].double()
        )
    found = torch.cat([memory.memory, weight.main_grad.view(1, -1)]).view(rows, OUT, inputs)  # type: ignore[attr-defined]
    assert (found - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("form", ["linear", "linear_by_row", "packed_by_tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_experts_are_the_sum_over_the_sequences_of_all_sharers(form: str, dtype: torch.dtype) -> None:
    """Seven rows of two ranks' sequences, each through some of three experts, and none through the last."""
    generator = torch.Generator().manual_seed(6)
    second, first = Sharers(2, 1), Sharers(2, 0)
    numbers_N = torch.cat([second.number(torch.arange(3)), first.number(torch.arange(4) // 2)])
    assert numbers_N.tolist() == [1, 3, 5, 0, 0, 2, 2]
    map_NE = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]) > 0
    coefficients_MB = torch.randn(2, 6, generator=generator)
    for expert, rows in enumerate(by_expert(numbers_N, map_NE)):
        weight = nn.Parameter(torch.empty(OUT, WIDTH), requires_grad=False)
        weight.main_grad = torch.full((OUT, WIDTH), torch.nan)  # type: ignore[attr-defined]
        memory = Rows(weight, 1)
        accumulator = Accumulator(memory)  # type: ignore[arg-type]
        accumulator._of_sharers_MB = coefficients_MB
        count = int(map_NE[:, expert].sum())
        input_R1I = torch.randn(count, 1, WIDTH, generator=generator).to(dtype)
        grad_R1O = torch.randn(count, 1, OUT, generator=generator).to(dtype)
        if form == "linear" or count == 0:
            accumulator.linear(weight, input_R1I, grad_R1O, rows)
        else:
            getattr(accumulator, form)(weight, input_R1I, grad_R1O, accumulator._beta(weight), rows)
        accumulator.finish()
        coefficients_MR = coefficients_MB.double()[:, numbers_N[map_NE[:, expert]]]
        expected = torch.einsum(
            "mr,ro,ri->moi", coefficients_MR, grad_R1O[:, 0].double(), input_R1I[:, 0].double()
        )
        found = torch.cat([memory.memory, weight.main_grad.view(1, -1)]).view(2, OUT, WIDTH)  # type: ignore[attr-defined]
        error = 1e-6 if dtype == torch.float32 else 2e-2
        assert (found - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("count", [1, 5, 6])
def test_ranks_without_sequence_parallelism_see_packed_rows_of_any_width(count: int) -> None:
    """Six positions, six times four ranks' too few and all in between: every rank knows the whole row."""
    weight = nn.Parameter(torch.empty(OUT, WIDTH), requires_grad=False)
    for rank in range(4):
        weight.main_grad = torch.zeros(OUT, WIDTH)  # type: ignore[attr-defined]
        memory = Rows(weight, 1)
        accumulator = Accumulator(memory, tensor=4, tensor_rank=rank)  # type: ignore[arg-type]
        accumulator.start()
        accumulator.take_positions(torch.zeros(count, dtype=torch.int64), torch.device("cpu"))
        accumulator.take(torch.tensor([[1.0], [2.0]]), torch.device("cpu"))
        accumulator.linear(weight, torch.ones(count, 1, WIDTH), torch.ones(count, 1, OUT))
        assert bool((memory.memory == count).all()) and bool((weight.main_grad == 2 * count).all())  # type: ignore[operator]


def test_rule() -> None:
    """One row needs no tiles; with more of them tiles win earlier."""
    assert is_short(10_000, 1, "cpu") and is_short(10_000, 1, "cuda")
    assert is_short(31, 2, "cpu") and not is_short(32, 2, "cpu") and not is_short(11, 4, "cpu")
    assert is_short(96, 2, "cuda") and not is_short(96, 8, "cuda")
