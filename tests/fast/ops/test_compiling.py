"""The operations under torch.compile: they run as they are, whatever surrounds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapo_mega import aggregation, ops
from gapo_mega.ops import reference


def a_step(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's arithmetic before and after each operation, which a compiler may fuse."""
    rows = [2 * a, b + 1]
    gram = ops.gramian(rows)
    weights = ops.min_norm(gram)
    out = torch.empty_like(a)
    ops.combine_(out, rows, weights)
    return 3 * out, gram


def test_each_operation_is_one_break_of_the_graph() -> None:
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1)).unbind()
    torch._dynamo.reset()
    a_step(a, b)  # the first call, since the compiler was imported, makes the mark
    explained = torch._dynamo.explain(a_step)(a, b)
    # Nothing stands between the first two operations.
    assert explained.graph_count == 3
    assert all("torch.compiler.disable" in reason.reason for reason in explained.break_reasons)


@pytest.mark.filterwarnings("error")
def test_a_compiled_step_is_the_step() -> None:
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1)).unbind()
    expected = a_step(a, b)
    compiled = torch.compile(a_step, backend="eager")
    for _ in range(2):
        found = compiled(a, b)
        assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))
    torch.testing.assert_close(found[1], reference.gramian([2 * a, b + 1]), rtol=1e-12, atol=1e-12)


def test_the_whole_path_and_its_errors_come_through() -> None:
    rows = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    method = aggregation.build("gapo")
    expected = ops.aggregate_(torch.empty(50), rows, None, None, method)

    @torch.compile(backend="eager")
    def step(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(a)
        return ops.aggregate_(out, [a, b], None, None, method).weights, out

    weights, out = step(*rows)
    assert torch.equal(weights, expected.weights)
    torch.testing.assert_close(out, reference.combine_(torch.empty(50), rows, weights), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"^weights: found "):
        torch.compile(lambda a: ops.combine_(a, [a], [float("nan")]), backend="eager")(rows[0])
