"""Rows as torch.autograd.grad gives them: pieces of any shape, some not contiguous, some None."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gapo_mega import ops
from gapo_mega.ops.arguments import Gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def vector(row: Gradient, like: list[Tensor]) -> Tensor:
    """What torch makes of a row: every piece in its own order of dimensions, None as zeros, float64."""
    pieces = [row] if isinstance(row, Tensor) else row
    filled = [torch.zeros_like(p) if q is None else q for p, q in zip(like, pieces, strict=True)]
    return torch.cat([piece.detach().double().reshape(-1) for piece in filled])


def expected_gram(rows: list[Gradient], like: list[Tensor]) -> Tensor:
    matrix = torch.stack([vector(row, like) for row in rows])
    return matrix @ matrix.T


def assert_close(found: Tensor, expected: Tensor) -> None:
    # Fewer than 2^13 products, exact in fp64 and added in another order: 2 n 2^-53 of |g_i| |g_j|.
    norms = expected.diagonal().sqrt()
    assert bool(((found - expected).abs() <= 2.0 ** (14 - 53) * torch.outer(norms, norms)).all())


class Net(nn.Module):
    """Gradients in every form: of a convolution, of a scalar, of parts that one loss leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.turned = nn.Parameter(torch.randn(4, 6))
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(8, 2)
        self.other = nn.Linear(8, 3)

    def losses(self, x: Tensor) -> list[Tensor]:
        hidden = self.convolution(x).mean(dim=(2, 3)).square() @ self.turned
        features = torch.cat([hidden, hidden[:, :2] * self.factor], dim=1)
        return [self.head(features).square().mean(), self.other(features).sin().sum()]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_gradients_of_a_network(net: Net) -> None:
    parameters = list(net.parameters())
    losses = net.losses(torch.randn(5, 3, 8, 8))
    rows: list[Gradient] = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses
    ]
    names = [name for name, _ in net.named_parameters()]
    assert [n for n, piece in zip(names, rows[0], strict=True) if piece is None] == [
        "other.weight",
        "other.bias",
    ]
    gram = ops.gramian(rows)
    assert_close(gram, expected_gram(rows, parameters))

    # The combination in fp32, into gradients that lie as the rows do.
    orders = [next(row[k] for row in rows if row[k] is not None) for k in range(len(parameters))]
    for parameter, piece in zip(parameters, orders, strict=True):
        parameter.grad = torch.full_like(piece, 7.0)
    grads = [parameter.grad for parameter in parameters]
    assert all(grad is not None for grad in grads)
    ops.combine_([grad for grad in grads if grad is not None], rows, [0.25, -3.0])
    combined = 0.25 * vector(rows[0], parameters) - 3.0 * vector(rows[1], parameters)
    flat = nn.utils.parameters_to_vector([grad for grad in grads if grad is not None]).double()
    # Two products and a sum in fp32.
    torch.testing.assert_close(flat, combined, rtol=1e-6, atol=1e-6 * float(combined.abs().max()))


def test_pieces_in_the_style_of_parameters_to_vector(net: Net) -> None:
    """A list of parameters, their vector, and the list of its parts are one row."""
    parameters = [p.detach() for p in net.parameters()]
    flat = nn.utils.parameters_to_vector(parameters)
    parts = list(flat.split([p.numel() for p in parameters]))
    assert torch.equal(ops.gramian([parameters]), ops.gramian([parts]))
    assert_close(ops.gramian([parameters, parts]), ops.gramian([flat, flat]))
    ops.combine_(parts, [parameters, [p.clone() for p in parameters]], [2.0, 1.0])
    torch.testing.assert_close(flat, 3.0 * nn.utils.parameters_to_vector(parameters))


@st.composite
def problems(draw):
    """Rows of random shapes, one order of dimensions and some missing pieces per shape, a type per row."""
    count = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4))
    dtypes = draw(st.lists(st.sampled_from([*DTYPES]), min_size=count + 1, max_size=count + 1))
    columns = []
    for shape in shapes:
        order = draw(st.permutations(range(len(shape))))
        back = [order.index(d) for d in range(len(shape))]
        memory = [shape[d] for d in order]
        columns.append([torch.randn(memory, generator=generator).to(dtype).permute(back) for dtype in dtypes])
    missing = draw(st.lists(st.integers(0, count), min_size=len(shapes), max_size=len(shapes)))
    rows = [
        [None if gap == i and count > 1 else column[i] for column, gap in zip(columns, missing, strict=True)]
        for i in range(count)
    ]
    return rows, [column[count] for column in columns]


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(0, 2**31))
def test_any_shape_and_order_equals_torch(problem, seed: int) -> None:
    rows, out = problem
    assert_close(ops.gramian(rows), expected_gram(rows, out))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(rows), generator=generator, dtype=torch.float64)
    assert ops.combine_(out, rows, weights) is out
    vectors = torch.stack([vector(row, out) for row in rows])
    # At most 5 fp32 roundings of the summands, then one to the output's type.
    size = (vectors.abs() * weights.abs()[:, None]).sum(dim=0)
    last = torch.finfo(out[0].dtype)
    combined = weights @ vectors
    allowed = size * 6 * 2.0**-24 + combined.abs() * last.eps + last.smallest_normal * last.eps
    assert bool(((vector(out, out) - combined).abs() <= allowed).all())


def test_a_missing_piece_leaves_what_is_there() -> None:
    """None is zero: for the inner products, and for the sum."""
    first, second = torch.ones(2, 3), torch.full((4,), 2.0)
    gram = ops.gramian([[first, None], [None, second], [first, second]])
    assert gram.tolist() == [[6.0, 0.0, 6.0], [0.0, 16.0, 16.0], [6.0, 16.0, 22.0]]
    out = [torch.empty(2, 3), torch.empty(4)]
    ops.combine_(out, [[first, None], [None, second]], [3.0, 5.0])
    assert out[0].tolist() == [[3.0] * 3] * 2 and out[1].tolist() == [10.0] * 4
    # With positions, too: the second piece begins behind the first one's six.
    assert ops.gramian([[None, second], [first, second]], segments=[(5, 8)]).tolist() == [[8, 8], [8, 9]]


def test_metric_and_rows_lie_alike() -> None:
    row = torch.arange(6.0).view(3, 2).T
    factors = torch.tensor([[1.0, 10.0, 100.0], [1000.0, 0.0, 0.0]])
    alike = torch.empty(3, 2).T.copy_(factors)
    expected = float((row.double().square() * factors.double()).sum())
    assert ops.gramian([row], weight=alike).item() == expected
    with pytest.raises(
        ValueError, match=r"weight: found shape \(2, 3\) with strides \(3, 1\), accepted: the mem"
    ):
        ops.gramian([row], weight=factors)
    with pytest.raises(ValueError, match=r"weight: found shape \(6,\), accepted: \(2, 3\) as in the rows"):
        ops.gramian([row], weight=factors.view(-1))


SQUARE = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        # autograd's gradient of a sum repeats one number.
        ([[SQUARE], [torch.ones(()).expand(4, 4)]], "rows[1][0]: found shape (4, 4) with strides (0, 0)"),
        ([[torch.ones(()).expand(4, 4)]], "rows[0][0]: found shape (4, 4) with strides (0, 0)"),
        (
            [[SQUARE.T], [SQUARE]],
            "rows[0][0]: found shape (4, 4) with strides (1, 4), accepted: a contiguous",
        ),
        ([[SQUARE[:, :2]]], "rows[0][0]: found shape (4, 2) with strides (4, 1)"),
        ([[torch.ones(2, 8)], [torch.ones(8, 2)]], "rows[1][0]: found shape (8, 2), accepted: (2, 8)"),
        ([[SQUARE, None], [SQUARE, None]], "rows: found None as piece 1 of every row"),
        ([[SQUARE], [None, SQUARE]], "rows[1]: found pieces of lengths [None, 16], accepted: [16]"),
        ([[SQUARE, SQUARE.bfloat16()]], "rows[0]: found element types ['torch.bfloat16', 'torch.float32']"),
        ([[SQUARE], [SQUARE.to_sparse()]], "rows[1][0]: found the layout torch.sparse_coo"),
    ],
)
def test_no_flat_view(rows, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.gramian(rows)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([torch.empty(4, 4), None], "out[1]: found None"),
        ([torch.empty(4, 4).T, torch.empty(3)], "out[0]: found shape (4, 4) with strides (1, 4)"),
        ([torch.empty(2, 8), torch.empty(3)], "out[0]: found shape (2, 8), accepted: (4, 4) as in the rows"),
        ([torch.empty(4, 4), torch.empty(3).half()], "out: found element types"),
    ],
)
def test_out_that_does_not_fit(out, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.combine_(out, [[SQUARE, torch.ones(3)], [SQUARE, None]], [1.0, 1.0])


def test_segments_need_the_elements_own_order() -> None:
    with pytest.raises(ValueError, match=r"segments: given with rows whose piece 1 of shape \(2, 3\)"):
        ops.gramian([[torch.ones(2), torch.ones(3, 2).T]], segments=[(0, 3)])


def test_out_is_one_of_the_rows_of_any_shape() -> None:
    rows = [[torch.ones(3, 2).T, torch.ones(2, 2)], [torch.ones(3, 2).T, torch.ones(2, 2)]]
    ops.combine_(rows[1], rows, [2.0, 3.0])
    assert [piece.tolist() for piece in rows[1]] == [[[5.0] * 3] * 2, [[5.0] * 2] * 2]
    with pytest.raises(ValueError, match=r"out: pieces 0 and 1 overlap"):
        ops.combine_([SQUARE[:2], SQUARE[1:3]], [[torch.ones(2, 4), torch.ones(2, 4)]], [1.0])
