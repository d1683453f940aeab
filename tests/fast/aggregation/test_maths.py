"""The aggregators against independent solvers and against the facts that follow from the paper."""

from __future__ import annotations

from itertools import combinations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from gapo_mega.aggregation import build, diagnose

# -- independent solvers ---------------------------------------------------------------------------


def simplex_by_slsqp(gram: np.ndarray) -> np.ndarray:
    """min-norm weights by SciPy's sequential quadratic programming, on a matrix of trace 1."""
    gram = gram / np.trace(gram)
    m = len(gram)
    solution = minimize(
        lambda a: a @ gram @ a,
        np.full(m, 1 / m),
        jac=lambda a: 2 * gram @ a,
        bounds=[(0, 1)] * m,
        constraints=[{"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones(m)}],
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    return np.asarray(solution.x)


def gapo_by_enumeration(rows: list[list[float]], p: float) -> list[float]:
    """GAPO's weights from its definition, in 200 digits: every support set, its equations solved."""
    with mpmath.workdps(200):
        vectors = [[mpmath.mpf(x) for x in row] for row in rows]
        powers = [mpmath.sqrt(mpmath.fsum(x * x for x in row)) ** p for row in vectors]
        scaled = [[x / power for x in row] for row, power in zip(vectors, powers, strict=True)]
        m = len(rows)
        gram = [[mpmath.fdot(scaled[i], scaled[j]) for j in range(m)] for i in range(m)]
        best: tuple[mpmath.mpf, list[mpmath.mpf]] | None = None
        for size in range(1, m + 1):
            for support in combinations(range(m), size):
                system = mpmath.matrix([[gram[i][j] for j in support] for i in support])
                y = mpmath.lu_solve(system, mpmath.ones(size, 1))
                total = mpmath.fsum(y)
                if total <= 0 or any(value < 0 for value in y):
                    continue
                value = 1 / total  # the squared norm that this support set reaches
                if best is None or value < best[0]:
                    a = [mpmath.mpf(0)] * m
                    for i, share in zip(support, y, strict=True):
                        a[i] = share / total
                    best = value, a
        assert best is not None
        return [float(share / power) for share, power in zip(best[1], powers, strict=True)]


def random_rows(seed: int, m: int, spread: float) -> Tensor:
    """m rows in m + 3 dimensions; their norms differ by up to exp(spread)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, m + 3, generator=generator, dtype=torch.float64)
    return rows * torch.exp(spread * torch.rand(m, 1, generator=generator, dtype=torch.float64))


def pair(norm_1: float, norm_2: float, cosine: float) -> Tensor:
    """Gram matrix of two gradients."""
    inner = norm_1 * norm_2 * cosine
    return torch.tensor([[norm_1**2, inner], [inner, norm_2**2]], dtype=torch.float64)


@pytest.mark.parametrize("m", [2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_mgda_equals_scipy(m: int, seed: int) -> None:
    gram = random_rows(seed, m, spread=1.0)
    gram = gram @ gram.T
    ours = build("mgda")(gram)
    reference = torch.from_numpy(simplex_by_slsqp(gram.numpy()))
    # SLSQP stops when the squared norm moves by 1e-16 of the trace: weights good to about 1e-7.
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)
    assert float(ours @ gram @ ours) <= float(reference @ gram @ reference) * (1 + 1e-12)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_gapo_equals_scipy_on_the_rescaled_gradients(p: float, seed: int) -> None:
    rows = random_rows(seed, 4, spread=1.0)
    rescaled = rows / rows.norm(dim=1, keepdim=True) ** p
    a = torch.from_numpy(simplex_by_slsqp((rescaled @ rescaled.T).numpy()))
    direction = build("gapo", p=p)(rows @ rows.T) @ rows
    # As above: the reference is good to about 1e-7 of the largest rescaled gradient.
    size = float(rescaled.norm(dim=1).max())
    torch.testing.assert_close(direction, a @ rescaled, rtol=0, atol=1e-6 * size)
    literal = build("gapo", p=p, eq17_literal=True)(rows @ rows.T)
    torch.testing.assert_close(literal, a, rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("spread", [1.0, 18.4])  # 18.4: norms differ by up to 1e8
@pytest.mark.parametrize("seed", range(4))
def test_gapo_has_all_its_digits_for_any_p_and_ratio_of_norms(p: float, spread: float, seed: int) -> None:
    rows = random_rows(seed, 3, spread)
    if spread > 2:
        rows *= torch.tensor([[1e-8], [1.0], [1e-4]], dtype=torch.float64)
    # Some are outside fp32, in which rows are combined.
    ours = build("gapo", p=p).weigh(rows @ rows.T).proposed
    exact = torch.tensor(gapo_by_enumeration(rows.tolist(), p), dtype=torch.float64)
    contribution = rows.norm(dim=1)
    # What counts is w_i ||g_i||. The Gram matrix itself is rounded to 1e-16, and the cosines of random
    # rows have condition numbers below 1e3.
    size = float((exact * contribution).max())
    torch.testing.assert_close(ours * contribution, exact * contribution, rtol=0, atol=1e-11 * size)


@pytest.mark.parametrize("p", [10.0, 50.0, 400.0])
@pytest.mark.parametrize("norms", [(1e-8, 1.0), (1e8, 1.0), (1e-7, 3e-7), (1e150, 1e-150)])
@pytest.mark.parametrize("scale", ["sum_to_one", "mean_norm"])
def test_gapo_overflows_for_no_p(p: float, norms: tuple[float, float], scale: str) -> None:
    cosine = -0.5
    weights = build("gapo", p=p, scale=scale)(pair(*norms, cosine))
    with mpmath.workdps(50):  # mpmath's exponents have no limit
        n_1, n_2 = (mpmath.mpf(norm) for norm in norms)
        s_1, s_2 = n_1 ** (1 - p), n_2 ** (1 - p)
        # Both derivatives of ||a s_1 u_1 + (1 - a) s_2 u_2||^2 are equal.
        expected = float((s_2 - cosine * s_1) / (s_1 - cosine * s_2) * n_2 / n_1)
    # The norms are good to 1e-16, and to 400e-16 after the power.
    assert float(weights[0] / weights[1]) == pytest.approx(expected, rel=1e-12)


def test_gapo_says_when_its_own_length_leaves_double_precision() -> None:
    with pytest.raises(
        ValueError, match=r"scale: found 'none', with which gapo gives .*choose scale: sum_to_one"
    ):
        build("gapo", p=50)(pair(1e-7, 2e-7, 0.1))


# -- paper.md "Consequences" -----------------------------------------------------------------------

NORM = st.floats(1e-3, 1e3)
COSINE = st.floats(-0.99, 0.99)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(NORM, NORM, COSINE)
def test_gapo_p1_of_two_objectives_is_p_gapo_with_equal_preference(
    n1: float, n2: float, cosine: float
) -> None:
    gram = pair(n1, n2, cosine)
    gapo, p_gapo = build("gapo", p=1)(gram), build("p_gapo", preference=[0.5, 0.5])(gram)
    # Equal in exact arithmetic. Float64, and a 2 x 2 system of condition (1 + |cos|) / (1 - |cos|) < 200.
    torch.testing.assert_close(gapo, p_gapo, rtol=1e-13, atol=0)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(NORM, NORM, COSINE)
def test_corner_collapse_happens_exactly_above_the_ratio_of_norms(
    n1: float, n2: float, cosine: float
) -> None:
    ratio = min(n1, n2) / max(n1, n2)
    assume(abs(cosine - ratio) > 1e-9)  # at the border itself rounding decides
    gram = pair(n1, n2, cosine)
    mgda, squared = build("mgda")(gram), build("gapo", p=2)(gram)
    interior = cosine < ratio
    for weights in (mgda, squared):
        assert bool((weights > 0).all()) == interior
        assert diagnose(gram, weights).corner == (not interior)
    if not interior:
        smaller = 0 if n1 < n2 else 1
        assert float(mgda[smaller]) == 1.0
        assert float(squared[1 - smaller]) > 0.0


@settings(deadline=None, max_examples=300, derandomize=True)
@given(NORM, NORM, COSINE, st.floats(0.05, 0.95))
def test_p_gapo_hurts_an_objective_exactly_below_the_ratio_of_preferences(
    n1: float, n2: float, cosine: float, share: float
) -> None:
    preference = [share, 1.0 - share]
    assume(all(abs(cosine + x / y) > 1e-9 for x, y in (preference, preference[::-1])))
    gram = pair(n1, n2, cosine)
    hurt = [i for i in (0, 1) if cosine < -preference[i] / preference[1 - i]]
    assert diagnose(gram, build("p_gapo", preference=preference)(gram)).hurt == hurt


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("m", [2, 3, 5])
def test_gapo_p1_is_mgda_on_unit_gradients_and_p0_is_mgda(seed: int, m: int) -> None:
    rows = random_rows(seed, m, spread=2.0)
    norms = rows.norm(dim=1)
    unit = rows / norms[:, None]
    # Float64 solves of systems whose condition numbers are below 1e3.
    gapo = build("gapo", p=1)(rows @ rows.T)
    torch.testing.assert_close(gapo * norms, build("mgda")(unit @ unit.T), rtol=0, atol=1e-11)
    zero = build("gapo", p=0)(rows @ rows.T)
    torch.testing.assert_close(zero, build("mgda")(rows @ rows.T), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["gapo", "mgda", "p_gapo", "weighted_sum"])
def test_the_predicted_change_is_the_inner_product_with_the_direction(name: str) -> None:
    rows = random_rows(3, 4, spread=2.0)
    gram = rows @ rows.T
    weights = build(name)(gram)
    direction = weights @ rows
    found = diagnose(gram, weights)
    size = float((rows.norm(dim=1) * direction.norm()).max())
    torch.testing.assert_close(found.predicted_change, rows @ direction, rtol=0, atol=1e-14 * size)
    assert found.direction_norm == pytest.approx(float(direction.norm()), rel=1e-12)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0])
def test_duplicating_a_gradient_leaves_gapos_direction_alone(p: float) -> None:
    rows = random_rows(4, 3, spread=1.0)
    more = rows[[0, 1, 2, 1, 0]]
    once = build("gapo", p=p)(rows @ rows.T) @ rows
    twice = build("gapo", p=p)(more @ more.T) @ more
    # The weights are not unique any more, the shortest vector is; the system is singular to 1e-16,
    # which leaves about half of the digits to the split but not to the sum.
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-9 * float(once.norm()))


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("seed", range(6))
def test_gapo_has_the_direction_of_theorem_3_2(p: float, seed: int) -> None:
    """<d, g^N_i> >= ||d||^2 > 0 for every i: a common ascent direction."""
    rows = random_rows(seed, 5, spread=2.0)
    gram = rows @ rows.T
    found = diagnose(gram, build("gapo", p=p)(gram))
    with_rescaled = found.predicted_change / found.norms**p
    assert found.direction_norm > 0
    assert float(with_rescaled.min()) >= found.direction_norm**2 * (1 - 1e-9)  # KKT, float64 solve
    assert found.hurt == []


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0])
def test_gapo_stands_still_at_a_pareto_stationary_point(p: float) -> None:
    rows = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -2.0]], dtype=torch.float64)
    weights = build("gapo", p=p)(rows @ rows.T)
    size = float((weights * rows.norm(dim=1)).sum())
    # The Gram matrix of three vectors in the plane is singular: its null vector is good to 1e-16 in the
    # squared norm, so to 1e-8 in the norm.
    assert float((weights @ rows).norm()) <= 1e-7 * size


def test_eq17_literal_is_the_printed_form_and_loses_common_ascent() -> None:
    gram = pair(1.0, 100.0, -0.5)
    assert build("gapo", p=1, eq17_literal=True)(gram).tolist() == pytest.approx([0.5, 0.5], rel=1e-14)
    assert diagnose(gram, build("gapo", p=1, eq17_literal=True)(gram)).hurt == [0]
    assert diagnose(gram, build("gapo", p=1)(gram)).hurt == []


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from(["gapo", "mgda", "p_gapo", "weighted_sum"]))
def test_mean_norm_keeps_the_direction_within_an_ordinary_length(seed: int, m: int, name: str) -> None:
    rows = random_rows(seed, m, spread=3.0)
    gram = rows @ rows.T
    length = diagnose(gram, build(name, scale="mean_norm")(gram)).direction_norm
    assert length <= float(rows.norm(dim=1).mean()) * (1 + 1e-12)
    parallel = torch.outer(torch.arange(1.0, m + 1), rows[0].float()).double()
    same_way = parallel @ parallel.T
    length = diagnose(same_way, build(name, scale="mean_norm")(same_way)).direction_norm
    assert length == pytest.approx(float(parallel.norm(dim=1).mean()), rel=1e-9)
