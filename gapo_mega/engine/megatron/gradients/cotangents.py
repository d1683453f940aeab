"""Factors of the objectives' cotangents, sequence by sequence.

A backward pass is linear in the cotangent, and attention never mixes sequences. If on every sequence s the
cotangents of the M losses with respect to the log-probabilities are multiples of R vectors,

    C_k[s, t] = sum_r A_r[k, s] u_r[s, t],

then R backward passes, one for each ``u_r``, hold all M gradients: ``g_k = sum_r sum_s A_r[k, s] p_r[s]``,
with ``p_r[s]`` the gradient that sequence s alone has in pass r. With one advantage for a sequence R is 1,
whatever the loss does with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Cotangents are float32. Each element is a product of a few rounded factors, so those that are multiples of
# one another in exact arithmetic differ by some 2^-23 of the largest.
TOLERANCE = 2.0**-20


@dataclass(frozen=True)
class Factor:
    """One backward pass.

    Attributes:
        coefficients_MB: float64, CPU.
        cotangent_BT: with respect to the log-probabilities, float32.
        only: the objective whose gradient this pass alone is, with coefficients of 1; None in general.
    """

    coefficients_MB: Tensor
    cotangent_BT: Tensor
    only: int | None = None


def each_alone(cotangents_MBT: Tensor) -> list[Factor]:
    """One pass for every objective. Exact for any cotangents, NaN and Inf included: none meets another."""
    count, sequences, _ = cotangents_MBT.shape
    return [
        Factor(
            torch.eye(count, dtype=torch.float64)[:, k : k + 1].expand(-1, sequences), cotangents_MBT[k], k
        )
        for k in range(count)
    ]


class Directions:
    """The principal directions of every sequence's cotangents over the objectives, found once.

    Every objective is first scaled to its largest cotangent: a small one's gradient is as exact as a large
    one's.
    """

    def __init__(self, cotangents_MBT: Tensor) -> None:
        """Waits for the device."""
        self._cotangents_MBT = cotangents_MBT
        # Where a cotangent is NaN or Inf, every objective has a pass of its own, and there are no directions.
        self._known = len(cotangents_MBT) > 1 and bool(cotangents_MBT.isfinite().all())
        if self._known:
            self._scaled_MBT, self._scale_M = _scaled(cotangents_MBT)
            self._basis_BMM = _basis(self._scaled_MBT)

    @property
    def rank(self) -> int:
        """The least R for these cotangents, at most M; M if one is NaN or Inf. Waits for the device."""
        most = len(self._cotangents_MBT)
        if not self._known:
            return most
        errors = [
            _projection(self._scaled_MBT, self._basis_BMM[:, :, :count]).sub_(self._scaled_MBT).abs_().amax()
            for count in range(1, most)
        ]
        for index, error in enumerate(torch.stack(errors).tolist()):
            if error <= TOLERANCE:
                return index + 1
        return most

    def factors(self, count: int) -> list[Factor]:
        """``count`` passes, of which those with the most of every sequence's cotangents come first.

        ``count`` is at least ``rank``; M or more gives ``each_alone``. Otherwise each sequence is projected
        on its ``count`` principal directions.
        """
        if count >= len(self._cotangents_MBT):
            return each_alone(self._cotangents_MBT)
        assert self._known, "cotangents that are not finite have a pass of their own each"
        found = []
        for index in range(count):
            direction_BM = self._basis_BMM[:, :, index]
            cotangent_BT = torch.einsum("bm,mbt->bt", direction_BM, self._scaled_MBT)
            coefficients_MB = (direction_BM.t() * self._scale_M[:, None]).cpu()
            found.append(Factor(coefficients_MB, cotangent_BT.float()))
        return found


def along(cotangents_MBT: Tensor, coefficients_MB: Tensor) -> tuple[Tensor, bool]:
    """The cotangent ``[B, T]`` whose multiples by given coefficients are nearest to ``cotangents_MBT``.

    Also returns whether they are equal, to rounding.
    """
    scaled_MBT, scale_M = _scaled(cotangents_MBT)
    # An objective without cotangents has coefficients of 0 only if that is what they should be.
    given_MB = coefficients_MB.to(scaled_MBT) / scale_M[:, None]
    square_B = (given_MB * given_MB).sum(dim=0)
    found_BT = torch.einsum("mb,mbt->bt", given_MB, scaled_MBT)
    found_BT = found_BT / torch.where(square_B > 0, square_B, 1.0)[:, None]
    error = (given_MB[:, :, None] * found_BT - scaled_MBT).abs().amax()
    return found_BT.float(), bool(error <= TOLERANCE)


def _scaled(cotangents_MBT: Tensor) -> tuple[Tensor, Tensor]:
    """Every objective over its largest cotangent, float64, and those; 1 for an objective without any."""
    exact_MBT = cotangents_MBT.double()
    scale_M = exact_MBT.abs().amax(dim=(1, 2))
    scale_M = torch.where(scale_M > 0, scale_M, 1.0)
    return exact_MBT / scale_M[:, None, None], scale_M


def _basis(scaled_MBT: Tensor) -> Tensor:
    """``[B, M, M]``: for each sequence orthonormal directions over the objectives, the principal one first.

    Eigenvectors of the M x M products, whose rounding hides parts below 1e-8 only.
    """
    products_BMM = torch.einsum("mbt,nbt->bmn", scaled_MBT, scaled_MBT).cpu()
    _, vectors_BMM = torch.linalg.eigh(products_BMM)
    found_BMM: Tensor = vectors_BMM.flip(-1).to(scaled_MBT.device)
    return found_BMM


def _projection(scaled_MBT: Tensor, basis_BMR: Tensor) -> Tensor:
    parts_BRT = torch.einsum("bmr,mbt->brt", basis_BMR, scaled_MBT)
    projection_MBT: Tensor = torch.einsum("bmr,brt->mbt", basis_BMR, parts_BRT)
    return projection_MBT


def sequence_coefficients(advantages_MBT: Tensor, mask_BT: Tensor) -> Tensor | None:
    """One advantage for each sequence ``[M, B]`` float64, CPU; None where they differ within a response.

    What the coefficients of a loss that is linear in the advantage are proportional to.
    """
    inside_MBT = advantages_MBT.double() * mask_BT
    first_B1 = mask_BT.int().argmax(dim=1, keepdim=True)
    first_MB = inside_MBT.gather(2, first_B1.expand(len(inside_MBT), -1, 1)).squeeze(2)
    if not torch.equal(inside_MBT, first_MB[:, :, None] * mask_BT):
        return None
    return first_MB.cpu()
