"""What torch does for its own operations in place: autograd learns of them, and some operands are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gapo_mega import ops

Write = Callable[[Tensor], object]


def combined(out: Tensor) -> None:
    ops.combine_(out, [torch.ones_like(out), out.detach()], [1.0, 2.0])


def combined_in_pieces(out: Tensor) -> None:
    half = out.numel() // 2
    ops.combine_([out[:half], out[half:]], [[torch.ones(half), torch.ones(out.numel() - half)]], [1.0])


def aggregated(out: Tensor) -> None:
    ops.aggregate_(out, [torch.ones_like(out)], None, None, lambda gram: torch.ones(1))


def added(out: Tensor) -> None:
    ops.gramian([torch.ones(3), torch.ones(3)], out=out)


def solved(out: Tensor) -> None:
    ops.min_norm_(out, torch.zeros(1, dtype=torch.int32), torch.eye(4, dtype=torch.float64))


def accumulated(out: Tensor) -> None:
    ops.accumulate_([torch.zeros(2, out.numel()), out], torch.ones(3, 2), torch.ones(2, out.numel()))


def of_torch(out: Tensor) -> None:
    out.add_(1.0)  # the others do as it does


FLAT = torch.arange(4.0)
WRITES: list[tuple[Write, Tensor]] = [
    (combined, FLAT),
    (combined_in_pieces, FLAT),
    (aggregated, FLAT),
    (added, torch.ones(2, 2, dtype=torch.float64)),
    (solved, torch.ones(4, dtype=torch.float64)),
    (accumulated, FLAT),
    (of_torch, FLAT),
]


@pytest.mark.parametrize(("write", "start"), WRITES)
def test_a_backward_that_needs_the_old_values_fails(write: Write, start: Tensor) -> None:
    factor = torch.ones_like(start, requires_grad=True)
    saved = start.clone()
    loss = (factor * saved).sum()
    write(saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("write", "start"), WRITES)
def test_a_view_and_its_base_share_the_change(write: Write, start: Tensor) -> None:
    base = torch.zeros(start.numel() + 2, dtype=start.dtype)
    before = base._version
    write(base[1 : 1 + start.numel()].view(start.shape))
    assert base._version > before


@pytest.mark.parametrize(("write", "start"), WRITES)
def test_a_leaf_that_requires_grad_is_refused_as_by_torch(write: Write, start: Tensor) -> None:
    leaf = start.clone().requires_grad_()
    with pytest.raises((ValueError, RuntimeError), match="requires grad"):
        write(leaf)
    assert torch.equal(leaf, start)
    with torch.no_grad():
        write(leaf)
    assert not torch.equal(leaf, start)


def test_what_autograd_would_record_is_refused() -> None:
    parameter = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="out: found a tensor that requires grad"):
        ops.combine_(parameter * 1, [torch.ones(4)], [1.0])
    with pytest.raises(ValueError, match=r"rows\[1\]: found a tensor that requires grad.*no derivative"):
        ops.combine_(torch.empty(4), [torch.ones(4), parameter * 1], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"weights: found a tensor that requires grad.*no derivative"):
        ops.combine_(torch.empty(4), [torch.ones(4)] * 2, parameter[:2].softmax(dim=0))
    with torch.no_grad():
        ops.combine_(torch.empty(4), [torch.ones(4), parameter], parameter[:2])


@pytest.mark.parametrize(("write", "start"), WRITES)
def test_a_tensor_of_inference_mode_is_changed_within_it_only(write: Write, start: Tensor) -> None:
    with torch.inference_mode():
        made = start.clone()
        write(made)
        assert not torch.equal(made, start)
    with pytest.raises((ValueError, RuntimeError), match="inference"):
        write(made)


@pytest.mark.parametrize("name", ["expanded", "strided", "negated"])
def test_memory_that_is_not_an_elements_own_is_refused(name: str) -> None:
    tensors = {
        "expanded": torch.zeros(1).expand(4),
        "strided": torch.zeros(7).as_strided((4,), (2,)),
        "negated": torch._neg_view(torch.ones(4)),
    }
    strange = tensors[name]
    with pytest.raises(ValueError, match=r"out: found .*accepted"):
        ops.combine_(strange, [torch.ones(4)], [1.0])
    with pytest.raises(ValueError, match=r"rows\[0\]: found .*accepted"):
        ops.combine_(torch.empty(4), [strange], [1.0])
    with pytest.raises(ValueError, match=r"rows\[0\]: found .*accepted"):
        ops.gramian([strange])


def test_overlapping_operands_are_refused() -> None:
    memory = torch.zeros(8)
    with pytest.raises(ValueError, match=r"out: overlaps rows\[1\]"):
        ops.gramian([torch.zeros(8), memory], out=memory.view(torch.float64).view(2, 2))
    with pytest.raises(ValueError, match=r"out: overlaps weight"):
        ops.gramian([torch.zeros(8)] * 2, weight=memory, out=memory.view(torch.float64).view(2, 2))
    gram, status = torch.eye(4, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="weights: overlaps gram"):
        ops.min_norm_(gram[1], status, gram)
    weights = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="status: overlaps weights"):
        ops.min_norm_(weights, weights.view(torch.int32)[:1], gram)
    assert torch.equal(gram, torch.eye(4, dtype=torch.float64))


def test_a_strided_place_for_weights_is_refused() -> None:
    place = torch.zeros(8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weights: found strides \(2,\), accepted: a contiguous tensor"):
        ops.min_norm_(place[::2], torch.zeros(1, dtype=torch.int32), torch.eye(4, dtype=torch.float64))
    assert not bool(place.any())
