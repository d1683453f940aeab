"""What the operations refuse, and that the message names the argument."""

from __future__ import annotations

import pytest
import torch

from gapo_mega import ops

ONE = torch.ones(8)
TWO = [torch.ones(8), torch.ones(8)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: found 0 rows"),
        ([ONE] * 17, "rows: found 17 rows"),
        ([ONE, torch.ones(9)], r"rows\[1\]: found pieces of lengths \[9\]"),
        ([[ONE, ONE], [ONE]], r"rows\[1\]: found pieces of lengths \[8\], accepted: \[8, 8\]"),
        ([TWO, [ONE, ONE.half()]], r"rows\[1\]: found element types \['torch.float16', 'torch.float32'\]"),
        ([ONE.double()], r"rows\[0\]: found element types"),
        ([ONE, torch.ones(8, device="meta")], "rows: found devices"),
        ([torch.ones(8, device="meta")], "rows: found devices"),
        ([torch.ones(2, 4)[:, ::2]], r"rows\[0\]: found shape \(2, 2\) with strides \(4, 2\)"),
        ([torch.ones(16)[::2]], r"rows\[0\]: found shape \(8,\) with strides \(2,\)"),
        ([[ONE, [1.0]]], r"rows\[0\]\[1\]: found list"),
    ],
)
def test_rows_that_do_not_fit(rows, message):
    with pytest.raises(ValueError, match=message):
        ops.gramian(rows)
    with pytest.raises(ValueError, match=message):
        ops.combine_(torch.ones(8), rows, [1.0] * len(rows))


@pytest.mark.parametrize(
    "segments", [[(4, 6), (2, 3)], [(0, 4), (3, 5)], [(-1, 2)], [(0, 9)], [(3, 2)], torch.tensor([[5, 12]])]
)
def test_segments_out_of_order_or_range(segments):
    with pytest.raises(ValueError, match=r"segments\[\d\]: found \["):
        ops.gramian(TWO, segments=segments)


@pytest.mark.parametrize(
    "segments", [[1, 2], [(0, 1, 2)], [(0.0, 1.5)], torch.zeros(2, 2, 2, dtype=torch.int64)]
)
def test_segments_that_are_no_pairs(segments):
    with pytest.raises(ValueError, match=r"segments: found .* accepted: pairs of whole numbers"):
        ops.gramian(TWO, segments=segments)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(7), "lengths"),
        (ONE.double(), "float64"),
        ([ONE, ONE], "lengths"),
        (ops.InverseRoot(torch.ones(7)), "lengths"),
        (ops.InverseRoot(ONE, correction=0.0), "the correction 0.0"),
        (ops.InverseRoot(ONE, eps=-1.0), "eps -1.0"),
        (ops.InverseRoot(ONE, eps=float("nan")), "eps nan"),
    ],
)
def test_weight_that_does_not_fit(weight, message):
    with pytest.raises(ValueError, match=f"weight: found .*{message}"):
        ops.gramian(TWO, weight=weight)


@pytest.mark.parametrize(
    "out",
    [torch.zeros(2, 2), torch.zeros(3, 3).double(), torch.zeros(2, 3).double(), torch.zeros(4).double()],
)
def test_gramian_out_that_does_not_fit(out):
    with pytest.raises(ValueError, match="out: found"):
        ops.gramian(TWO, out=out)


def test_partial_overlap_is_refused():
    memory = torch.ones(20)
    rows = [memory[:8], memory[10:18]]
    for out in (memory[1:9], memory[7:15], memory[9:17]):
        with pytest.raises(ValueError, match=r"out: piece 0 overlaps piece 0 of rows\[\d\]"):
            ops.combine_(out, rows, [1.0, 1.0])
    ops.combine_(memory[10:18], rows, [1.0, 1.0])
    assert memory[10:18].tolist() == [2.0] * 8


def test_overlap_with_another_piece_or_as_another_type_is_refused():
    memory = torch.ones(16)
    with pytest.raises(ValueError, match="overlaps piece 1"):
        ops.combine_([memory[8:], torch.ones(8)], [[memory[:8], memory[8:]]], [1.0])
    half = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="overlaps"):
        ops.combine_(half.view(torch.float16), [half], [1.0])
    with pytest.raises(ValueError, match="pieces 0 and 1 overlap"):
        ops.combine_([memory[:8], memory[4:12]], [[torch.ones(8), torch.ones(8)]], [1.0])


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1.0, 2.0, 3.0],
        torch.ones(3),
        torch.ones(()),
        torch.ones(2, 1),
        [1.0, float("nan")],
        [float("inf"), 0.0],
        [1.0, None],
        torch.tensor([1j, 1j]),
    ],
)
def test_weights_that_do_not_fit(weights):
    with pytest.raises(ValueError, match="weights: found"):
        ops.combine_(torch.ones(8), TWO, weights)


@pytest.mark.parametrize("out", [torch.ones(7), [torch.ones(4), torch.ones(4)], torch.ones(8, device="meta")])
def test_combine_out_that_does_not_fit(out):
    with pytest.raises(ValueError, match="out"):
        ops.combine_(out, TWO, [1.0, 1.0])


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.ones(2, 3), "found torch.float64 of shape"),
        (torch.ones(4), "found torch.float64 of shape"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "negative"),
        (torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), "NaN or Inf"),
        (torch.eye(17), "17 rows"),
        (torch.empty(0, 0), "0 rows"),
    ],
)
def test_grams_that_are_none(gram, message):
    with pytest.raises(ValueError, match=f"gram: .*{message}"):
        ops.min_norm(gram)


@pytest.mark.parametrize(
    ("weights", "status", "message"),
    [
        (torch.zeros(2), torch.zeros(1, dtype=torch.int32), "weights: found torch.float32"),
        (torch.zeros(3).double(), torch.zeros(1, dtype=torch.int32), r"weights: found .*\(3,\)"),
        (torch.zeros(2).double(), torch.zeros(1), "status: found torch.float32"),
    ],
)
def test_min_norm_into_tensors_that_do_not_fit(weights, status, message):
    with pytest.raises(ValueError, match=message):
        ops.min_norm_(weights, status, torch.eye(2).double())


def test_a_duality_gap_needs_a_weight_for_every_row():
    with pytest.raises(ValueError, match=r"weights: found shape \(3,\), accepted: \(2,\)"):
        ops.duality_gap(torch.eye(2), torch.ones(3))


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("GAPO_ISA", "mmx")
    with pytest.raises(ValueError, match=r"GAPO_ISA: found 'mmx', accepted on this processor: .*baseline"):
        ops.gramian(TWO)
    monkeypatch.setenv("GAPO_ISA", "baseline")
    assert ops.info()["isa"] == "baseline"
    assert ops.gramian(TWO).tolist() == [[8.0, 8.0], [8.0, 8.0]]


def test_zeros_without_memory_are_refused():
    """Forward-mode differentiation makes such tensors; their address is 0."""
    zeros = torch._efficientzerotensor((8,))
    with pytest.raises(ValueError, match=r"rows\[0\]: found zeros without memory"):
        ops.gramian([zeros, torch.ones(8)])
    with pytest.raises(ValueError, match="out: found zeros without memory"):
        ops.combine_(zeros, TWO, [1.0, 1.0])
    assert ops.gramian([zeros.clone(), torch.ones(8)]).tolist() == [[0.0, 0.0], [0.0, 8.0]]
