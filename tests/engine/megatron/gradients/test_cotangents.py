"""Factors of cotangents: numpy's singular values say how many there are; together they are the cotangents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.engine.megatron.gradients import cotangents

OBJECTIVES, SEQUENCES, LENGTH = 4, 3, 17
SIZES = torch.tensor([1.0, 1e-6, 1e4, 30.0])[:, None, None]  # objectives on scales of their own


def made(rank: int, seed: int = 0) -> Tensor:
    """float32 cotangents whose sequences have these many directions; the second sequence has one."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(OBJECTIVES, rank, SEQUENCES, generator=generator)
    left[:, 1:, 1] = 0.0
    right = torch.randn(rank, SEQUENCES, LENGTH, generator=generator)
    product: Tensor = SIZES * torch.einsum("mrb,rbt->mbt", left, right)
    return product.float()


def rebuilt(factors: list[cotangents.Factor]) -> Tensor:
    return torch.stack([f.coefficients_MB[:, :, None] * f.cotangent_BT.double() for f in factors]).sum(dim=0)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_as_many_factors_as_the_fullest_sequence_has_directions(rank: int) -> None:
    found = made(rank)
    numpys = max(
        np.linalg.matrix_rank((found / SIZES)[:, s].double().numpy(), tol=1e-5) for s in range(SEQUENCES)
    )
    assert cotangents.Directions(found).rank == rank == numpys
    error = (rebuilt(cotangents.Directions(found).factors(rank)) - found).abs().amax(dim=(1, 2))
    # float32 of the cotangents; every objective against its own size.
    assert bool((error <= 1e-6 * found.abs().amax(dim=(1, 2))).all())


def test_too_few_factors_are_noticed_in_the_smallest_objective() -> None:
    """One element of one sequence, by a hundred thousandth of its objective's size."""
    found = made(1)
    assert cotangents.Directions(found).rank == 1
    found[1, 2, 5] += 1e-5 * found[1].abs().max()
    assert cotangents.Directions(found).rank == 2


def test_an_objective_without_any_cotangents_has_coefficients_of_zero() -> None:
    found = made(1)
    found[2] = 0.0
    directions = cotangents.Directions(found)
    (factor,) = directions.factors(directions.rank)
    assert not factor.coefficients_MB[2].any() and factor.coefficients_MB[0].all()
    assert cotangents.Directions(torch.zeros(OBJECTIVES, SEQUENCES, LENGTH)).rank == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_objective(value: float) -> None:
    found = made(1)
    found[3, 0, 0] = value
    assert cotangents.Directions(found).rank == OBJECTIVES
    for index, factor in enumerate(cotangents.Directions(found).factors(OBJECTIVES)):
        assert factor.only == index
        torch.testing.assert_close(factor.cotangent_BT, found[index], rtol=0, atol=0, equal_nan=True)
        assert factor.coefficients_MB.tolist() == [[float(k == index)] * SEQUENCES for k in range(OBJECTIVES)]


def test_one_objective() -> None:
    found = made(1)[:1]
    directions = cotangents.Directions(found)
    (factor,) = directions.factors(directions.rank)
    assert factor.only == 0 and torch.equal(factor.cotangent_BT, found[0])


class TestAlong:
    def test_given_coefficients_up_to_a_factor(self) -> None:
        found = made(1)
        (factor,) = cotangents.Directions(found).factors(1)
        cotangent_BT, fits = cotangents.along(found, 0.01 * factor.coefficients_MB)
        assert fits
        again = rebuilt([cotangents.Factor(0.01 * factor.coefficients_MB, cotangent_BT)])
        error = (again - found).abs().amax(dim=(1, 2))
        assert bool((error <= 1e-6 * found.abs().amax(dim=(1, 2))).all())

    @pytest.mark.parametrize("what", ["direction", "coefficient", "nan", "zero"])
    def test_what_does_not_fit(self, what: str) -> None:
        found = made(1)
        (factor,) = cotangents.Directions(found).factors(1)
        coefficients_MB = factor.coefficients_MB.clone()
        if what == "direction":
            found[0, 0] = found[0, 0].flip(0)
        elif what == "coefficient":
            coefficients_MB[1, 0] *= 1.001
        elif what == "nan":
            found[0, 0, 0] = float("nan")
        else:
            coefficients_MB[:, 0] = 0.0
        assert not cotangents.along(found, coefficients_MB)[1]

    def test_sequences_without_advantages(self) -> None:
        found = made(1)
        found[:, 0] = 0.0
        (factor,) = cotangents.Directions(found).factors(1)
        coefficients_MB = factor.coefficients_MB.clone()
        coefficients_MB[:, 0] = 0.0
        cotangent_BT, fits = cotangents.along(found, coefficients_MB)
        assert fits and not cotangent_BT[0].any()


def test_advantages_of_sequences() -> None:
    mask_BT = torch.tensor([[False, True, True, False], [False, False, True, True], [False] * 4])
    values_MB = torch.tensor([[1.5, -2.0, 0.0], [0.25, 0.0, 0.0]])
    advantages_MBT = values_MB[:, :, None] * mask_BT
    found = cotangents.sequence_coefficients(advantages_MBT, mask_BT)
    assert found is not None and torch.equal(found, values_MB.double())
    advantages_MBT[1, 0, 2] = 0.3
    assert cotangents.sequence_coefficients(advantages_MBT, mask_BT) is None
