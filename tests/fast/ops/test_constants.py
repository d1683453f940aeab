"""What is kept on a device is made on the host and copied there, whatever torch's default device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gapo_mega import aggregation, ops
from gapo_mega.aggregation.on_device import _constant
from gapo_mega.ops.aggregate import _triangle
from gapo_mega.ops.constants import resident

ELSEWHERE = torch.device("meta")  # a device without memory, so that nobody can compute on it


class MadeElsewhere(TorchDispatchMode):
    """Operations whose result is on ``ELSEWHERE``, and which read nothing from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, (tuple, list)) else [result]
        given = [argument for argument in args if isinstance(argument, Tensor)]
        if any(isinstance(part, Tensor) and part.device == ELSEWHERE for part in parts) and not any(
            argument.device.type == "cpu" for argument in given
        ):
            self.made.append(str(func))
        return result


def test_constants_reach_a_device_by_a_copy_alone() -> None:
    with MadeElsewhere() as seen:
        rows, columns = _triangle.__wrapped__(3, ELSEWHERE)
        numbers = _constant.__wrapped__((1.0, 2.0), ELSEWHERE)
    assert {rows.device, columns.device, numbers.device} == {ELSEWHERE}
    assert [name for name in seen.made if not name.startswith(("aten.unbind", "aten.select"))] == []


def test_the_triangle_is_numpys() -> None:
    rows, columns = _triangle(5, torch.device("cpu"))
    expected = np.triu_indices(5)
    assert rows.tolist() == expected[0].tolist() and columns.tolist() == expected[1].tolist()


def test_a_constant_made_in_inference_mode_serves_outside_it() -> None:
    with torch.inference_mode():
        kept = resident(torch.ones(3, device="cpu").double(), torch.device("cpu"))
        made = _constant.__wrapped__((0.25, 0.75), torch.device("cpu"))
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (leaf * kept).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [1.0, 1.0, 1.0]
    assert not made.is_inference()


@pytest.mark.parametrize("name", ["gapo", "mgda", "p_gapo", "weighted_sum"])
def test_another_default_device_changes_nothing(name: str) -> None:
    rows = [torch.randn(30, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = ops.aggregate_(torch.empty(30), rows, None, None, aggregation.build(name))
    out = torch.empty(30)
    with ELSEWHERE:
        found = ops.aggregate_(out, rows, None, None, aggregation.build(name))
        assert torch.equal(ops.min_norm(found.gram), ops.min_norm(expected.gram))
        plain = ops.solve(found.gram, lambda gram: ops.min_norm(gram))
    assert torch.equal(found.weights, expected.weights)
    assert plain.ok() and out.device.type == "cpu"
