"""What holds for *every* aggregator: the folder is enumerated, a new file is tested at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gapo_mega import ops
from gapo_mega.aggregation import (
    Aggregator,
    HostMethod,
    NonFiniteGramError,
    Solution,
    ZeroGradientError,
    build,
    diagnose,
    methods,
)

NAMES = sorted(methods())
SCALES = ("none", "sum_to_one", "mean_norm")
FREE_LENGTH = ("sum_to_one", "mean_norm")  # the scales that ignore a factor common to all gradients


def random_gram(seed: int, m: int, spread: float = 2.0) -> Tensor:
    """Gram matrix of m gradients whose norms differ by up to exp(spread)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, m + 3, generator=generator, dtype=torch.float64)
    rows *= torch.exp(spread * torch.rand(m, 1, generator=generator, dtype=torch.float64))
    return rows @ rows.T


def assert_same(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Equal relative to the *largest* entry: entries that cancel have no digits of their own."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * float(expected.abs().max()))


def require_symmetric(name: str) -> None:
    """Skip the test for a method that declares that it takes the objectives in an order."""
    if not build(name).symmetric:
        pytest.skip(f"{name} takes the objectives in an order")


# What is wrong with a Gram matrix: the status, the error, and its words.
FAULTS: dict[str, tuple[ops.Status, type[ValueError], str]] = {
    "nan": (
        ops.Status.NOT_FINITE,
        NonFiniteGramError,
        "gram: the gradients of objectives [2] are not finite; no weights follow from them",
    ),
    "negative": (
        ops.Status.NEGATIVE_DIAGONAL,
        ValueError,
        "gram: found the diagonal [1.0, 4.0, -1.0], accepted: squared norms, >= 0",
    ),
    "zero": (
        ops.Status.ZERO_GRADIENT,
        ZeroGradientError,
        "gram: the gradients of objectives [2] are zero and zero_gradient is 'stop'; "
        "set zero_gradient: exclude to go on with the others",
    ),
}


def faulty_gram(fault: str) -> Tensor:
    """Of three gradients, the last of which is at fault."""
    last = {"nan": math.nan, "negative": -1.0, "zero": 0.0}[fault]
    return torch.diag(torch.tensor([1.0, 4.0, last], dtype=torch.float64))


@pytest.mark.every("aggregation")
class TestContract:
    @pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
    @pytest.mark.parametrize("scale", SCALES)
    def test_weights_are_finite_float64_one_per_objective(self, name: str, m: int, scale: str) -> None:
        gram = random_gram(m, m)
        before = gram.clone()
        weights = build(name, scale=scale)(gram)
        assert weights.shape == (m,)
        assert weights.dtype == torch.float64
        assert weights.device.type == "cpu"
        assert bool(weights.isfinite().all())
        assert bool(weights.any())
        assert torch.equal(gram, before)

    @pytest.mark.parametrize("seed", range(4))
    def test_the_order_of_the_objectives_does_not_matter(self, name: str, seed: int) -> None:
        require_symmetric(name)
        gram = random_gram(seed, 4)
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        permuted = build(name)(gram[order][:, order])
        # Float64 solves of a well-conditioned 4 x 4 system in another order of elimination.
        assert_same(permuted, build(name)(gram)[order], rtol=1e-9)

    @pytest.mark.parametrize("scale", FREE_LENGTH)
    @pytest.mark.parametrize("factor", [1e-20, 1e-3, 1e20])
    def test_a_common_factor_changes_no_weight(self, name: str, scale: str, factor: float) -> None:
        gram = random_gram(0, 3)
        aggregator = build(name, scale=scale)
        # The factor is no power of two, so that every product is rounded anew.
        assert_same(aggregator(gram * factor), aggregator(gram), rtol=1e-9)

    def test_sum_to_one_and_mean_norm_set_the_length_only(self, name: str) -> None:
        gram = random_gram(1, 3)
        norms = gram.diagonal().sqrt()
        plain, ones, mean = (build(name, scale=scale)(gram) for scale in SCALES)
        assert float(ones.sum()) == pytest.approx(1.0, rel=1e-12)  # one float64 division
        assert float((mean.abs() * norms).sum()) == pytest.approx(float(norms.mean()), rel=1e-12)
        for other in (ones, mean):
            assert_same(other / other.sum(), plain / plain.sum(), rtol=1e-12)

    def test_duplicated_gradients_give_a_usable_direction(self, name: str) -> None:
        gram = random_gram(2, 3)
        index = torch.tensor([0, 1, 2, 1, 1])
        doubled = gram[index][:, index]
        weights = build(name)(doubled)
        assert bool(weights.isfinite().all())
        assert diagnose(doubled, weights).direction_norm > 0

    def test_zero_gradients_are_excluded(self, name: str) -> None:
        gram = torch.zeros(5, 5, dtype=torch.float64)
        others = torch.tensor([0, 2, 3])
        gram[others[:, None], others] = random_gram(3, 3)
        aggregator = build(name, scale="sum_to_one")
        weights = aggregator(gram)
        assert diagnose(gram, weights).excluded == [1, 4]
        assert weights[[1, 4]].tolist() == [0.0, 0.0]
        # The same 3 x 3 problem: the very same arithmetic.
        assert torch.equal(weights[others], aggregator(gram[others][:, others]))

    def test_zero_gradients_stop_on_demand(self, name: str) -> None:
        gram = random_gram(4, 3)
        gram[1], gram[:, 1] = 0.0, 0.0
        with pytest.raises(ZeroGradientError, match=r"objectives \[1\] are zero") as caught:
            build(name, zero_gradient="stop")(gram)
        assert caught.value.objectives == [1]

    def test_nothing_but_zero_gradients_gives_zero_weights(self, name: str) -> None:
        for scale in SCALES:
            weights = build(name, scale=scale)(torch.zeros(3, 3, dtype=torch.float64))
            assert weights.tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_is_named(self, name: str, bad: float) -> None:
        gram = random_gram(5, 4)
        gram[2], gram[:, 2] = bad, bad
        with pytest.raises(NonFiniteGramError, match=r"objectives \[2\] are not finite") as caught:
            build(name)(gram)
        assert caught.value.objectives == [2]

    def test_an_inner_product_that_is_not_finite_is_named(self, name: str) -> None:
        gram = random_gram(6, 3)
        gram[0, 2], gram[2, 0] = math.inf, math.inf
        with pytest.raises(NonFiniteGramError) as caught:
            build(name)(gram)
        assert caught.value.objectives == [0, 2]

    @pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0)])
    def test_what_is_no_square_matrix_is_refused(self, name: str, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"gram: found shape"):
            build(name)(torch.ones(shape, dtype=torch.float64))

    def test_a_negative_diagonal_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"gram: found the diagonal"):
            build(name)(torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64))

    def test_common_options_are_checked(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"scale: found 'unit', accepted: none, sum_to_one, mean_norm"):
            build(name, scale="unit")
        with pytest.raises(ValueError, match=r"zero_gradient: found 'skip', accepted: exclude, stop"):
            build(name, zero_gradient="skip")

    def test_unknown_options_name_the_nearest(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"found 'zero_gradients' \(did you mean 'zero_gradient'\?\)"):
            build(name, zero_gradients="stop")

    def test_the_state_goes_through_a_checkpoint(self, name: str) -> None:
        gram = random_gram(7, 3)
        first, second = build(name), build(name)
        first.commit(first.weigh(gram))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(gram), second(gram))
        with pytest.raises(ValueError, match=first.name):
            build(name).load_state_dict({"of_another_method": 1})

    def test_a_step_and_a_call_have_the_same_weights(self, name: str) -> None:
        aggregator = build(name)
        for m, zero in ((1, []), (3, []), (4, [1]), (8, [0, 5])):
            gram = random_gram(m, m)
            gram[zero], gram[:, zero] = 0.0, 0.0
            found = ops.solve(gram, aggregator)
            assert found.ok() and (found.status.dtype, found.status.shape) == (torch.int32, (1,))
            assert torch.equal(found.weights, aggregator(gram))
            assert torch.equal(found.gram, gram)

    def test_asking_changes_nothing(self, name: str) -> None:
        """What was answered in between, good or bad, has no influence, before and after a step was taken."""
        asked, fresh = build(name), build(name)
        other, gram = random_gram(8, 3), random_gram(9, 3)
        for _ in range(2):
            state = copy.deepcopy(asked.state_dict())
            for between in (other, torch.zeros_like(other), other * math.nan, -other):
                ops.solve(between, asked)
            assert asked.state_dict() == state
            found = asked.weigh(gram)
            assert torch.equal(found.weights, asked.weigh(gram).weights)
            assert torch.equal(found.weights, fresh(gram))
            asked.commit(found)
            fresh.commit(fresh.weigh(gram))

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_status_and_its_error_go_together(self, name: str, fault: str) -> None:
        """A step has the status, a call raises, and the words of the status are those of the call."""
        status, kind, words = FAULTS[fault]
        aggregator = build(name, zero_gradient="stop")
        gram = faulty_gram(fault)
        found = ops.solve(gram, aggregator)
        assert int(found.status) == status and not found.ok()
        assert found.weights.tolist() == [0.0] * 3
        with pytest.raises(ValueError) as caught:
            aggregator(gram)
        error = aggregator.error(found)
        assert type(error) is type(caught.value) is kind
        assert str(error) == str(caught.value) == words


@pytest.mark.parametrize("name", NAMES)
def test_its_name_is_how_it_is_built(name: str) -> None:
    aggregator = build(name)
    assert isinstance(aggregator, Aggregator)
    assert aggregator.name == name


def test_the_methods_of_the_paper_are_there() -> None:
    assert {"gapo", "p_gapo", "mgda", "weighted_sum"} <= set(NAMES)


def test_unknown_methods_name_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"aggregation\.name: found 'pgapo' \(did you mean 'p_gapo'\?\).*weighted_sum"
    ):
        build("pgapo")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gapo", {"p": -1}, r"p: found -1, accepted: a finite number >= 0"),
        ("gapo", {"p": math.nan}, r"p: found nan"),
        ("gapo", {"p": math.inf}, r"p: found inf"),
        ("gapo", {"p": "1"}, r"p: found '1'"),
        ("gapo", {"p": True}, r"p: found True"),
        ("gapo", {"eq17_literal": 1}, r"eq17_literal: found 1, accepted: true, false"),
        ("p_gapo", {"preference": [0.5, 0.6]}, r"preference: found \[0.5, 0.6\], accepted: .* sum 1"),
        ("p_gapo", {"preference": [1.0, 0.0]}, r"preference: .* > 0"),
        ("p_gapo", {"preference": [1.5, -0.5]}, r"preference: .* > 0"),
        ("p_gapo", {"preference": [math.nan, 0.5]}, r"preference"),
        ("p_gapo", {"preference": []}, r"preference"),
        ("p_gapo", {"preference": 1.0}, r"preference: found 1.0"),
        ("p_gapo", {"preference": "ab"}, r"preference: found 'ab'"),
        ("weighted_sum", {"weights": [1.0, -1.0]}, r"weights: found \[1.0, -1.0\], accepted: .*>= 0"),
        ("weighted_sum", {"weights": [0.0, 0.0]}, r"weights: .*not all 0"),
        ("weighted_sum", {"weights": [math.inf, 0.0]}, r"weights: .*finite"),
        ("mgda", {"p": 1}, r"aggregation\.options \(mgda\): found 'p'"),
    ],
)
def test_option_values_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("name", "options"), [("p_gapo", {"preference": [0.2, 0.8]}), ("weighted_sum", {"weights": [1, 2]})]
)
def test_one_number_per_objective_is_asked_for(name: str, options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(
        ValueError, match=rf"{option}: found 2 numbers, accepted: one for each of the 3 objectives"
    ):
        build(name, **options)(random_gram(0, 3))


def test_p_gapo_renormalises_its_preference_over_what_is_left() -> None:
    gram = torch.diag(torch.tensor([4.0, 0.0, 9.0], dtype=torch.float64))
    weights = build("p_gapo", preference=[0.2, 0.5, 0.3])(gram)
    # lambda = (0.4, 0.6) over norms (2, 3); two float64 divisions.
    assert weights.tolist() == pytest.approx([0.2, 0.0, 0.2], rel=1e-14)


def test_weighted_sum_keeps_the_other_weights_and_may_end_with_nothing() -> None:
    gram = torch.diag(torch.tensor([4.0, 0.0, 9.0], dtype=torch.float64))
    assert build("weighted_sum", weights=[1, 2, 3])(gram).tolist() == [1.0, 0.0, 3.0]
    for scale in SCALES:
        assert build("weighted_sum", weights=[0, 1, 0], scale=scale)(gram).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", SCALES)
def test_weights_beyond_double_precision_are_told_with_what_they_came_from(scale: str) -> None:
    gram = torch.diag(torch.tensor([1e-40, 0.0, 1e-36], dtype=torch.float64))
    gapo = build("gapo", p=30, scale=scale)
    found = ops.solve(gram, gapo)
    if scale != "none":
        assert found.ok()
        return
    assert int(found.status) == ops.Status.OUT_OF_RANGE
    assert str(gapo.error(found)) == (
        "scale: found 'none', with which gapo gives the weights [inf, inf] for gradients of norm "
        "[1e-20, 9.999999999999999e-19], outside the range of float32 (1.2e-38 to 3.4e+38), in which "
        "gradients are weighted and summed; choose scale: sum_to_one or mean_norm"
    )


@dataclass(kw_only=True)
class GivesUp(HostMethod):
    name: ClassVar[str] = "gives_up"

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        return Solution(gram.diagonal(), status=ops.Status.NOT_CONVERGED)


def test_a_formula_that_finds_no_weights_says_so() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))
    found = ops.solve(gram, GivesUp())
    assert int(found.status) == ops.Status.NOT_CONVERGED
    assert found.weights.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(
        ValueError, match=r"gram: found \[\[1.0, .*for which gives_up finds no weights"
    ) as caught:
        GivesUp()(gram)
    assert str(GivesUp().error(found)) == str(caught.value)


def test_diagnosis_of_a_known_step() -> None:
    rows = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    found = diagnose(rows @ rows.T, weights)
    direction = weights @ rows
    assert found.norms.tolist() == [5.0, 1.0, 0.0]
    assert torch.equal(found.predicted_change, rows @ direction)
    assert found.direction_norm == pytest.approx(float(direction.norm()), rel=1e-14)
    # -3 / 5, rounded twice.
    torch.testing.assert_close(found.cosines[0], torch.tensor([1.0, -0.6, 0.0]).double(), rtol=1e-7, atol=0)
    assert found.excluded == [2]
    assert found.opposed and found.conflict
    assert found.hurt == [1]  # direction (1, 4): against (-1, 0)
    assert not found.corner  # the third has weight 0 because it has no gradient


@pytest.mark.parametrize(("cosine", "opposed"), [(-1e-17, False), (-1e-9, True), (0.0, False), (1e-9, False)])
@pytest.mark.parametrize("norm", [1e-12, 1.0, 1e9])
def test_gradients_that_are_orthogonal_up_to_rounding_are_not_opposed(cosine, opposed, norm):
    gram = torch.tensor([[1.0, cosine * norm], [cosine * norm, norm**2]], dtype=torch.float64)
    assert diagnose(gram, torch.tensor([0.5, 0.5])).opposed == opposed


def test_diagnosis_tells_a_corner() -> None:
    gram = torch.tensor([[1.0, 2.0], [2.0, 16.0]], dtype=torch.float64)  # cos 1/2 > 1/4
    assert diagnose(gram, build("mgda")(gram)).corner
    assert not diagnose(gram, build("gapo")(gram)).corner
    assert not diagnose(gram, build("gapo")(gram)).conflict


def test_diagnosis_passes_numbers_that_are_not_finite_on() -> None:
    gram = torch.tensor([[math.nan, math.nan], [math.nan, 4.0]], dtype=torch.float64)
    found = diagnose(gram, torch.zeros(2, dtype=torch.float64))
    assert math.isnan(float(found.norms[0]))
    assert float(found.norms[1]) == 2.0
    assert found.excluded == []
