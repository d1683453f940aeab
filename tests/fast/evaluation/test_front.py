"""Dominance and the measures of fronts, against volumes and distances worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gapo_mega.evaluation.front import Candidate, coverage, hypervolume, judge, nondominated, spacing


def candidate(name: str, method: str, *points: tuple[float, ...]) -> Candidate:
    return Candidate(name, method, {seed: point for seed, point in enumerate(points, 1)})


def brute_force_volume(points: np.ndarray, reference: np.ndarray, cells: int = 60) -> float:
    """The share of cells of a grid below some point, times the volume of the grid."""
    top = points.max(axis=0)
    axes = [
        low + (np.arange(cells) + 0.5) / cells * (high - low)
        for low, high in zip(reference, top, strict=True)
    ]
    centres = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)[..., None, :]
    return float((centres < points).all(axis=-1).any(axis=-1).mean() * np.prod(top - reference))


def test_the_volume_of_two_steps() -> None:
    assert hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), [0.0, 0.0]) == pytest.approx(3.0)
    assert hypervolume(np.array([[1.0, 2.0], [2.0, -1.0]]), [0.0, 0.0]) == pytest.approx(2.0)
    assert hypervolume(np.array([[-1.0, -2.0]]), [0.0, 0.0]) == 0.0


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_volume_against_counted_cells(objectives: int) -> None:
    """To a cell's width: each of 60 layers of a face may be counted wrong by half a cell."""
    points = np.random.default_rng(5).uniform(0.2, 1.0, (6, objectives))
    reference = np.full(objectives, 0.1)
    assert hypervolume(points, reference.tolist()) == pytest.approx(
        brute_force_volume(points, reference), rel=0.03
    )


def test_dominance_by_its_definition() -> None:
    points = np.random.default_rng(2).integers(0, 5, (40, 3)).astype(float)  # with ties and doubles
    wanted = [not any((q >= p).all() and (q > p).any() for q in points) for p in points]
    assert nondominated(points).tolist() == wanted


def test_coverage_by_its_definition() -> None:
    ours, theirs = np.random.default_rng(3).integers(0, 6, (2, 15, 2)).astype(float)
    front = [p for p in theirs if not any((q >= p).all() and (q > p).any() for q in theirs)]
    wanted = np.mean([any((q >= p).all() for q in ours) for p in front])
    assert coverage(ours, theirs) == pytest.approx(wanted)


def test_spacing_by_its_definition() -> None:
    points = np.random.default_rng(4).uniform(size=(7, 3))
    nearest = [
        min(float(np.abs(p - q).sum()) for j, q in enumerate(points) if j != i) for i, p in enumerate(points)
    ]
    mean = sum(nearest) / 7
    wanted = (sum((d - mean) ** 2 for d in nearest) / 6) ** 0.5
    assert spacing(points) == pytest.approx(wanted, rel=1e-12)  # sums of seven float64
    assert spacing(np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])) == 0.0
    assert spacing(points[:1]) is None


def test_spacing_is_of_the_union_front_in_its_own_units() -> None:
    front = [
        candidate("a", "A", (0.0, 10.0)),
        candidate("b", "A", (1.0, 5.0)),
        candidate("c", "B", (4.0, 0.0)),
    ]
    beaten, double = candidate("d", "B", (0.5, 1.0)), candidate("e", "B", (4.0, 0.0))
    scaled = np.array([[0.0, 1.0], [0.25, 0.5], [1.0, 0.0]])
    assert judge([*front, beaten, double], ["x", "y"], None)["spacing"] == pytest.approx(spacing(scaled))
    assert judge(front[:1], ["x", "y"], None)["spacing"] is None


def test_a_front_of_two_methods() -> None:
    found = judge(
        [candidate("a", "A", (0.0, 1.0)), candidate("b", "A", (1.0, 0.0)), candidate("c", "B", (0.5, 0.25))],
        ["x", "y"],
        [-1.0, -1.0],
    )
    assert found["union_front"] == ["a", "b", "c"]
    # L-shapes of 1 x 2 and 2 x 1, and what (0.5, 0.25) adds beyond them.
    assert found["methods"]["A"]["hypervolume"] == pytest.approx(3.0)
    assert found["hypervolume"] == pytest.approx(3.0 + 0.5 * 0.25)
    # The union front spans [0, 1] in both, so nothing is scaled. A must rise by 0.25 in y, or 0.5 in x.
    assert found["methods"]["A"]["epsilon"] == pytest.approx(0.25)
    assert found["methods"]["A"]["igd_plus"] == pytest.approx(0.25 / 3)
    assert found["methods"]["B"]["epsilon"] == pytest.approx(0.75)
    assert found["methods"]["B"]["igd_plus"] == pytest.approx((0.75 + 0.5) / 3)
    assert found["methods"]["A"]["coverage"] == {"B": 0.0}


def test_scales_of_objectives_do_not_matter_to_distances() -> None:
    points = np.random.default_rng(4).normal(size=(6, 2))

    def measured(unit: float) -> list[float]:
        rows = points * [1.0, unit]
        made = [candidate(str(i), "AB"[i % 2], tuple(row)) for i, row in enumerate(rows)]
        methods = judge(made, ["x", "y"], None)["methods"].values()
        return [method[key] for method in methods for key in ("epsilon", "igd_plus")]

    assert measured(1000.0) == pytest.approx(measured(1.0), rel=1e-9)


def test_confidence_over_seeds() -> None:
    """With a seed in which the one wins, and one in which the other does."""
    sure = judge(
        [candidate("a", "A", (1.0, 1.0), (1.1, 1.1)), candidate("b", "B", (0.0, 0.0), (0.1, 0.1))],
        ["x", "y"],
        None,
    )
    assert sure["confidence_from"] == "seeds"
    assert [found["nondominated"] for found in sure["candidates"]] == [1.0, 0.0]
    open_ = judge(
        [candidate("a", "A", (1.0, 1.0), (0.0, 0.0)), candidate("b", "B", (0.0, 0.0), (1.0, 1.0))],
        ["x", "y"],
        [0.0, 0.0],
    )
    # Draws of seeds (1, 1) and (2, 2), each with probability 1/4, decide; 2000 draws: +- 0.03 is 3 errors.
    assert [found["nondominated"] for found in open_["candidates"]] == pytest.approx([0.75, 0.75], abs=0.03)
    low, high = open_["methods"]["A"]["hypervolume_interval"]
    assert (low, high) == pytest.approx((0.0, 1.0))


def test_without_a_spread_there_is_no_confidence() -> None:
    found = judge([candidate("a", "A", (1.0, 1.0))], ["x", "y"], None)
    assert found["confidence_from"] is None and found["candidates"][0]["nondominated"] is None
    assert found["hypervolume"] is None and found["methods"]["A"]["hypervolume_interval"] is None


def test_one_seed_takes_the_held_out_errors() -> None:
    def one(name: str, point: tuple[float, float]) -> Candidate:
        return Candidate(name, name, {1: point}, (0.1, 0.1))

    found = judge([one("a", (1.0, 0.0)), one("b", (1.0, -0.1))], ["x", "y"], None)
    assert found["confidence_from"] == "held-out prompts"
    a, b = (c["nondominated"] for c in found["candidates"])
    # b is dominated where it is less in both: P(x_b < x_a) P(y_b < y_a) = 0.5 * Phi(1 / sqrt 2) = 0.380.
    assert b == pytest.approx(1 - 0.5 * 0.7602, abs=0.035)
    assert a == pytest.approx(1 - 0.5 * (1 - 0.7602), abs=0.035)


def test_candidates_with_other_seeds_are_compared_by_those_they_have() -> None:
    one = Candidate("a", "A", {1: (1.0, 1.0), 2: (3.0, 3.0)})
    other = Candidate("b", "B", {1: (2.0, 2.0)})
    found = judge([one, other], ["x", "y"], [0.0, 0.0])
    assert found["methods"]["A"]["hypervolume_by_seed"] == pytest.approx({"1": 1.0, "2": 9.0})
    assert found["methods"]["B"]["hypervolume_by_seed"] == pytest.approx({"1": 4.0})
