"""Methods that TorchJD has, too, on random and adversarial Jacobians.

Its UPGrad and DualProj get a projector by enumeration that adds nothing to the Gram matrix, in place of one
that adds 1e-4 and is no dependency here. Its CAGrad and Nash-MTL need solvers of their own: see
test_optimality.py.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchjd import aggregation as torchjd
from torchjd.aggregation import UPGradWeighting
from torchjd.linalg import DualConeProjector

from gapo_mega.aggregation import build

KINDS = ("generic", "scales", "opposed", "near collinear", "dependent", "conflict")
COUNTS = (2, 3, 5, 8)


def jacobian(kind: str, m: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * m + seed)
    rows = torch.randn(m, m + 3, generator=generator, dtype=torch.float64)
    if kind == "scales":
        rows *= torch.logspace(0, 3, m, dtype=torch.float64)[:, None]
    elif kind == "opposed":
        rows[1] = 0.3 * rows[1] - rows[0]
    elif kind == "near collinear":
        rows[1] = rows[0] + 1e-2 * rows[1]
    elif kind == "dependent":
        rows[-1] = 0.5 * rows[:-1].sum(dim=0)
    elif kind == "conflict":
        rows -= 1.2 * rows.mean(dim=0)
    return rows


class Enumerating(DualConeProjector):
    """``argmin v'Gv, v >= u`` over every set of rows that are raised."""

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        solved = [self._one(u, G.numpy()) for u in np.atleast_2d(U.numpy())]
        return torch.from_numpy(np.stack(solved)).reshape(U.shape)

    def _one(self, bounds: np.ndarray, gram: np.ndarray) -> np.ndarray:
        best = bounds.copy()
        for size in range(1, len(gram) + 1):
            for raised in map(list, combinations(range(len(gram)), size)):
                v = bounds.copy()
                inner = gram[np.ix_(raised, raised)]
                v[raised] -= np.linalg.lstsq(inner, gram[raised] @ bounds, rcond=None)[0]
                if (v >= bounds - 1e-12).all() and v @ gram @ v < best @ gram @ best:
                    best = v
        return best


def preference_of(m: int) -> Tensor:
    return torch.arange(1, m + 1, dtype=torch.float64) / (m * (m + 1) / 2)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("m", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_dual_cone_projections_are_torchjds(kind: str, m: int, given: bool) -> None:
    rows = jacobian(kind, m, 0)
    gram = rows @ rows.T
    preference = preference_of(m) if given else None
    options: dict[str, Any] = {} if preference is None else {"preference": preference.tolist()}
    for name, weighting in (("upgrad", UPGradWeighting), ("dual_proj", torchjd.DualProjWeighting)):
        expected = weighting(pref_vector=preference, projector=Enumerating())(gram) @ rows
        found = build(name, **options)(gram) @ rows
        # The reference solves with the Gram matrix as it is, of condition up to 1e8.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.norm()))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("m", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_aligned_mtl_is_torchjds(kind: str, m: int, given: bool) -> None:
    gram = jacobian(kind, m, 1) @ jacobian(kind, m, 1).T
    preference = preference_of(m) if given else None
    options: dict[str, Any] = {} if preference is None else {"preference": preference.tolist()}
    expected = torchjd.AlignedMTLWeighting(pref_vector=preference)(gram)
    found = build("aligned_mtl", **options)(gram)
    # Two eigendecompositions of matrices of condition up to 1e8.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("m", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_imtl_g_is_torchjds(kind: str, m: int) -> None:
    rows = jacobian(kind, m, 2)
    gram = rows @ rows.T
    expected = torchjd.IMTLGWeighting()(gram)
    # Theirs inverts the Gram matrix as it is, of condition up to 1e8.
    torch.testing.assert_close(
        build("imtl_g")(gram), expected, rtol=0, atol=1e-7 * float(expected.abs().max())
    )
    ascending = build("imtl_g", ascend=True)(gram)
    torch.testing.assert_close(ascending, expected * expected.sum() * torch.sign(gram @ ascending).mean())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("m", COUNTS)
@pytest.mark.parametrize("kind", ["generic", "opposed", "conflict"])
def test_fairgrad_is_torchjds(kind: str, m: int, alpha: float) -> None:
    """Where SciPy's least squares, which it calls, converges: not where norms differ by 1000."""
    rows = jacobian(kind, m, 3) / (m + 3) ** 0.5
    gram = rows @ rows.T
    expected = torchjd.FairGradWeighting(alpha=alpha)(gram)
    # Its tolerance is 1e-8 of a sum of squares.
    torch.testing.assert_close(
        build("fairgrad", alpha=alpha)(gram), expected, rtol=0, atol=1e-4 * float(expected.max())
    )


@pytest.mark.parametrize("m", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pcgrad_is_torchjds_in_the_same_orders(kind: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gram = jacobian(kind, m, 4) @ jacobian(kind, m, 4).T
    drawn: list[Tensor] = []
    draw = torch.randperm

    def recorded(count: int, **options: Any) -> Tensor:
        drawn.append(draw(count, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "randperm", recorded)
    found = build("pcgrad", seed=5)(gram)
    orders = iter(list(drawn))
    assert len(drawn) == m
    monkeypatch.setattr(torch, "randperm", lambda count: next(orders))
    expected = torchjd.PCGradWeighting()(gram)
    # One sum in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
