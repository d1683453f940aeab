"""The solver against exact rational arithmetic, scipy, and the optimality conditions."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from gapo_mega import ops
from gapo_mega.ops import reference
from tests.helpers.grams import Matrix, exact, families, residual


def solve(a: Matrix, b: list[Fraction]) -> list[Fraction] | None:
    """Gauss-Jordan; None where the matrix is singular."""
    n = len(b)
    rows = [[*row, right] for row, right in zip(a, b, strict=True)]
    for k in range(n):
        pivot = next((i for i in range(k, n) if rows[i][k]), None)
        if pivot is None:
            return None
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [x / rows[k][k] for x in rows[k]]
        for i in range(n):
            if i != k and rows[i][k]:
                rows[i] = [x - rows[i][k] * top for x, top in zip(rows[i], rows[k], strict=True)]
    return [row[n] for row in rows]


def exact_minimum(gram: Tensor) -> Fraction:
    """min over the simplex of w'Gw, by all affinely independent support sets."""
    g = exact(gram)
    best = None
    for size in range(1, len(g) + 1):
        for support in combinations(range(len(g)), size):
            system = [[*(g[i][j] for j in support), Fraction(-1)] for i in support]
            system.append([Fraction(1)] * size + [Fraction(0)])
            found = solve(system, [Fraction(0)] * size + [Fraction(1)])
            if found is not None and min(found[:size]) >= 0 and (best is None or found[size] < best):
                best = found[size]  # the multiplier is the value w'Gw
    assert best is not None
    return best


def exact_value(gram: Tensor, weights: Tensor) -> Fraction:
    w = [Fraction(x) for x in weights.tolist()]
    g = exact(gram)
    value = sum(w[i] * g[i][j] * w[j] for i in range(len(w)) for j in range(len(w)))
    return Fraction(value) / sum(w) ** 2


@pytest.mark.parametrize("scales", [[2.0**-9, 1, 1, 0.5], [1, 1, 1, 0.5], [1, 2.0**-20, 2.0**7, 1]])
def test_a_row_that_is_orthogonal_to_two_opposing_ones(scales):
    """The minimum is 0, of the last two rows. The second has no summands that tell whether it is above."""
    rows = torch.tensor([[0, 1], [1, 1], [-1, 1], [3, -3]]).double() * torch.tensor(scales).double()[:, None]
    weights = ops.min_norm(rows @ rows.T)
    expected = [0, 0, 3 * scales[3], scales[2]]
    torch.testing.assert_close(
        weights, torch.tensor(expected, dtype=torch.float64) / sum(expected), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 3, 2, 0], [3, 2, 1, 0]])
def test_a_row_that_is_orthogonal_to_all_of_a_minimum_refuses_none_of_it(order):
    """The level of the three is 0 up to rounding, and the fourth has no summand beside that rounding."""
    gram = torch.tensor([[2, -21, 0, 5], [-21, 225, 0, -54], [0, 0, 1.9, 0], [5, -54, 0, 13]]).double()
    system = [[Fraction(x) for x in row] for row in ([2, -21, 5], [-21, 225, -54], [1, 1, 1])]
    three = solve(system, [Fraction(0), Fraction(0), Fraction(1)])  # G w = 0: the third row follows
    expected = [float(x) for x in (three[0], three[1], 0, three[2])]
    found = ops.min_norm(gram[order][:, order])
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64)[order], rtol=1e-13, atol=1e-30
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_value_equals_rational_arithmetic(data):
    m = data.draw(st.integers(1, 4))
    n = data.draw(st.integers(1, 5))
    # Small integers: the Gram is exact, and parallel, opposing, equal and zero rows are frequent.
    rows = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=m, max_size=m))
    ).double()
    scales = torch.tensor([2.0 ** data.draw(st.integers(-20, 20)) for _ in range(m)]).double()
    rows = rows * scales[:, None]
    gram = rows @ rows.T
    weights = ops.min_norm(gram)
    least = exact_minimum(gram)
    largest = Fraction(float(gram.diagonal().max()))
    # The value may only exceed the minimum, by rounding of the weights (2^-52) times the summands.
    assert 0 <= exact_value(gram, weights) - least <= Fraction(1, 10**13) * largest
    assert residual(gram, weights) <= 1e-9


@pytest.mark.parametrize("m", [2, 3, 4, 6, 8, 9, 12, 16])
@pytest.mark.parametrize("family", list(families(2, 0)))
def test_optimality_conditions_on_adversarial_rows(family, m):
    for seed in range(6 if m <= 8 else 2):
        rows = families(m, seed)[family]
        gram = rows @ rows.T
        gram = (gram + gram.T) / 2
        assert residual(gram, ops.min_norm(gram)) <= 1e-9, gram


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e8, 1e12])
def test_opposing_and_orthogonal_rows_have_closed_forms(ratio):
    opposing = torch.tensor([[1.0, -ratio], [-ratio, ratio * ratio]], dtype=torch.float64)
    expected = torch.tensor([ratio / (1 + ratio), 1 / (1 + ratio)], dtype=torch.float64)
    torch.testing.assert_close(ops.min_norm(opposing), expected, rtol=1e-14, atol=0)
    orthogonal = torch.diag(torch.tensor([1.0, ratio**2, ratio], dtype=torch.float64))
    inverse = 1 / orthogonal.diagonal()
    torch.testing.assert_close(ops.min_norm(orthogonal), inverse / inverse.sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("m", [2, 5, 8, 12])
def test_scaling_by_powers_of_two_changes_no_bit(m):
    rows = torch.randn(m, m + 2, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    gram = rows @ rows.T
    gram = (gram + gram.T) / 2
    assert torch.equal(ops.min_norm(gram), ops.min_norm(gram * 2.0**200))
    assert torch.equal(ops.min_norm(gram), ops.min_norm(gram * 2.0**-200))


@pytest.mark.parametrize("m", [3, 8, 10])
def test_value_equals_scipy(m):
    generator = torch.Generator().manual_seed(m)
    for _ in range(5):
        rows = torch.randn(m, m, generator=generator, dtype=torch.float64) + 0.5
        gram = rows @ rows.T
        g = gram.numpy()
        found = minimize(
            lambda w, g=g: (w @ g @ w, 2 * g @ w),
            [1 / m] * m,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        weights = ops.min_norm(gram)
        # SLSQP's own accuracy.
        assert float(weights @ gram @ weights) == pytest.approx(found.fun, rel=1e-7)
        torch.testing.assert_close(weights, reference.min_norm(gram), rtol=1e-9, atol=1e-12)


def test_rows_that_are_tied_share_alike():
    assert ops.min_norm(torch.ones(3, 3)).tolist() == [1 / 3] * 3
    assert ops.min_norm(torch.ones(16, 16)).tolist() == [1 / 16] * 16
    assert ops.min_norm(torch.zeros(3, 3)).tolist() == [1 / 3] * 3
    assert ops.min_norm(torch.diag(torch.tensor([4.0, 0.0, 0.0]))).tolist() == [0.0, 0.5, 0.5]
    assert ops.min_norm(torch.tensor([[7.0]])).tolist() == [1.0]


@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_duplicated_rows_share_the_weight_of_one(m):
    rows = torch.randn(m // 2, m + 3, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    single = rows @ rows.T
    single = (single + single.T) / 2
    index = torch.arange(m) % (m // 2)
    weights = ops.min_norm(single[index][:, index])
    # The mean of up to 2^8 corners, each exact to rounding.
    torch.testing.assert_close(weights[: m // 2] * 2, ops.min_norm(single), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(weights[m // 2 :], weights[: m // 2], rtol=1e-13, atol=1e-15)


def test_of_many_minimisers_the_mean_of_the_corners_is_taken():
    # The origin lies between rows 1 and 3, 1 and 6, 3 and 5, 5 and 6, and in triangles such as 0 2 4.
    rows = torch.tensor([[0, 1], [1, 0], [-1, -1], [-1, 0], [1, -1], [2, 0], [-2, 0]]).double()
    weights = ops.min_norm(rows @ rows.T)
    corners = []
    for size in (2, 3):
        for support in combinations(range(7), size):
            system = [[*(Fraction(int(rows[i, k])) for i in support)] for k in range(2)]
            found = positive_solution([*system, [Fraction(1)] * size])
            if found and not any(set(smaller) <= set(support) for smaller, _ in corners):
                corners.append((support, found))
    expected = [
        sum(dict(zip(*c, strict=True)).get(i, Fraction(0)) for c in corners) / len(corners) for i in range(7)
    ]
    assert weights.tolist() == pytest.approx([float(x) for x in expected], rel=1e-13)
    rows[3] *= 1 + 1e-15  # rounding decides nothing
    assert ops.min_norm(rows @ rows.T).tolist() == pytest.approx(weights.tolist(), rel=1e-12)


def test_a_row_that_is_orthogonal_to_a_corner_does_not_hide_it():
    # The corners of {w >= 0, rows' w = 0, sum 1}; the last row is orthogonal to all rows of the first one.
    rows = [[0, -1, 2], [1, 0, 2], [1, -1, -1], [0, 2, 0], [-1, -3, 1], [1, -1, 1], [-1, 0, 1], [2, 0, 2]]
    corners = torch.tensor(
        [[0, 0, 0.25, 0.5, 0.25, 0, 0, 0], [0, 0, 0.4, 0.2, 0, 0, 0.4, 0]], dtype=torch.float64
    )
    matrix = torch.tensor(rows).double()
    torch.testing.assert_close(corners @ matrix, torch.zeros(2, 3).double(), rtol=0, atol=1e-15)
    found = ops.min_norm(matrix @ matrix.T)
    torch.testing.assert_close(found, corners.mean(dim=0), rtol=1e-13, atol=1e-30)


def positive_solution(system: Matrix) -> list[Fraction] | None:
    """Positive weights with ``rows' w = 0`` and sum 1, if they are unique."""
    for left in combinations(range(3), len(system[0])):
        found = solve([system[k] for k in left], [Fraction(int(k == 2)) for k in left])
        if found is None or min(found) <= 0:
            continue
        products = [sum(a * w for a, w in zip(row, found, strict=True)) for row in system]
        return found if products == [0, 0, 1] else None
    return None


@pytest.mark.parametrize("m", [2, 3, 5, 8, 9, 12])
@pytest.mark.parametrize("family", sorted({*families(2, 0)} - {"denormal gram"}))
def test_the_order_of_the_rows_does_not_matter(family, m):
    for seed in range(8 if m <= 8 else 2):
        rows = families(m, seed)[family]
        gram = rows @ rows.T
        gram = (gram + gram.T) / 2
        order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
        permuted = ops.min_norm(gram[order][:, order])
        # Eliminated in another order; near opposing rows leave ten digits.
        torch.testing.assert_close(permuted, ops.min_norm(gram)[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [2, 3, 4, 6])
@pytest.mark.parametrize("family", ["generic", "duplicated", "rank one", "zero row"])
def test_the_reference_shares_ties_out_in_the_same_way(family, m):
    for seed in range(4):
        rows = families(m, seed)[family]
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)  # the reference is for ordinary ones
        gram = rows @ rows.T
        gram = (gram + gram.T) / 2
        torch.testing.assert_close(ops.min_norm(gram), reference.min_norm(gram), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "gram",
    [
        [[1.0, -0.9, -0.9], [-0.9, 1.0, -0.9], [-0.9, -0.9, 1.0]],
        [[1.0, 1.5], [1.5, 1.0]],
        [[4.0, -2.1], [-2.1, 1.0]],
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_an_indefinite_matrix_is_refused(gram, scale):
    matrix = torch.tensor(gram, dtype=torch.float64) * scale
    with pytest.raises(ValueError, match="accepted: a positive semidefinite matrix"):
        ops.min_norm(matrix)
    weights, status = torch.ones(len(gram), dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    ops.min_norm_(weights, status, matrix)
    assert (weights.tolist(), int(status)) == ([0.0] * len(gram), ops.Status.NOT_CONVERGED)


@pytest.mark.parametrize("off", [1e-16, 1e-12, 1e-8])
def test_a_negative_eigenvalue_of_rounding_is_none(off):
    opposing = torch.tensor([[1.0, -1.0 - off], [-1.0 - off, 1.0]], dtype=torch.float64)
    assert ops.min_norm(opposing).tolist() == [0.5, 0.5]
    parallel = torch.tensor([[1.0, 1.0 + off], [1.0 + off, 1.0]], dtype=torch.float64)
    assert ops.min_norm(parallel).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("m", [2, 5, 8, 9, 13, 16])
@pytest.mark.parametrize("family", list(families(2, 0)))
def test_into_tensors_with_a_status(family, m):
    rows = families(m, 2)[family]
    gram = rows @ rows.T
    gram = (gram + gram.T) / 2
    weights = torch.full((m,), 7.0, dtype=torch.float64)
    status = torch.full((1,), 7, dtype=torch.int32)
    ops.min_norm_(weights, status, gram)
    assert int(status) == ops.Status.OK
    assert torch.equal(weights, ops.min_norm(gram))


def test_rows_of_norm_zero_can_be_left_out():
    weights, status = torch.empty(3, dtype=torch.float64), torch.empty(1, dtype=torch.int32)
    ops.min_norm_(weights, status, torch.diag(torch.tensor([4.0, 0.0, 1.0])).double(), exclude_zero=True)
    assert (weights.tolist(), int(status)) == ([0.2, 0.0, 0.8], ops.Status.OK)
    ops.min_norm_(weights, status, torch.zeros(3, 3, dtype=torch.float64), exclude_zero=True)
    assert (weights.tolist(), int(status)) == ([0.0, 0.0, 0.0], ops.Status.OK)


@pytest.mark.parametrize(
    ("gram", "expected"),
    [
        ([[1.0, float("nan")], [float("nan"), 1.0]], ops.Status.NOT_FINITE),
        ([[float("inf"), 0.0], [0.0, 1.0]], ops.Status.NOT_FINITE),
        ([[1.0, 0.0], [0.0, -1.0]], ops.Status.NEGATIVE_DIAGONAL),
    ],
)
def test_what_is_no_gram_matrix_is_a_status_and_never_weights(gram, expected):
    weights, status = torch.full((2,), 7.0, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    ops.min_norm_(weights, status, torch.tensor(gram, dtype=torch.float64))
    assert (weights.tolist(), int(status)) == ([0.0, 0.0], expected)


@pytest.mark.parametrize("m", [3, 8, 16])
def test_the_duality_gap_certifies_the_minimum_and_nothing_else(m):
    rows = torch.randn(m, m // 2 + 2, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    gram = rows @ rows.T
    gram = (gram + gram.T) / 2
    best = ops.min_norm(gram)
    # Rounding of the weights, 2^-53 each, times summands of the size of the largest square.
    assert abs(ops.duality_gap(gram, best)) <= 1e-14 * float(gram.diagonal().max())
    other = torch.full((m,), 1.0 / m, dtype=torch.float64)
    change = gram @ other
    gap = ops.duality_gap(gram, other)
    assert gap == pytest.approx(float(other @ change - change.min()), rel=1e-12)
    # What the certificate bounds: the squared distance from the minimum-norm point.
    assert float((other - best) @ gram @ (other - best)) <= gap


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_a_support_that_could_be_smaller_is_made_smaller(order):
    # Rows 0 and 1 are parallel to 3e-6: one of them with row 2 is the minimum to rounding, and all three
    # are it exactly. The smaller support is taken whatever the order.
    rows = torch.tensor([[1, -2.5e-6, 1], [1, 0.75e-6, 1], [-1, 0, 1]]).double()[order]
    weights = ops.min_norm(rows @ rows.T)
    assert len(weights.nonzero()) == 2
    assert residual(rows @ rows.T, weights) <= 1e-9


def test_what_is_far_from_a_gram_matrix_is_refused():
    with pytest.raises(ValueError, match="gram: found"):
        ops.min_norm(torch.tensor([[1e-300, 1e300], [1e300, 1e-300]], dtype=torch.float64))
