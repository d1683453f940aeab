"""GDPO in its variants, MO-GRPO, RVPO and GD2PO against loops in numpy, written from the sources."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gapo_mega.scalarization import build

Array = NDArray[np.float64]

# Float64 sums in another order, through a division by standard deviations of about 1.
EXACT = 1e-12


def draw(seed: int, *, samples: int | None = None, objectives: int | None = None) -> tuple[torch.Tensor, ...]:
    """Scores of unequal scales, some rounded so that they tie; groups; lengths."""
    generator = torch.Generator().manual_seed(seed)
    m = objectives or 1 + seed % 4
    n, prompts = samples or 2 + seed % 6, 1 + seed % 5
    scale_M1 = 10.0 ** torch.randint(-2, 3, (m, 1), generator=generator)
    scores_MB = torch.randn(m, n * prompts, generator=generator) * scale_M1
    if seed % 3 == 0:
        scores_MB = (scores_MB / scale_M1).round() * scale_M1
    lengths_B = torch.randint(1, 30, (n * prompts,), generator=generator)
    return scores_MB, torch.arange(prompts).repeat_interleave(n), lengths_B


def by_prompt(scores: Array, group: Array, normalized: Callable[[Array], Array]) -> Array:
    """``normalized`` of every objective and prompt."""
    found = np.zeros_like(scores)
    for k in range(len(scores)):
        for number in np.unique(group):
            rows = group == number
            found[k, rows] = normalized(scores[k, rows])
    return found


def standard(epsilon: float) -> Callable[[Array], Array]:
    return lambda r: np.zeros_like(r) if np.ptp(r) == 0 else (r - r.mean()) / (r.std(ddof=1) + epsilon)


def of_others(r: Array) -> Array:
    """NeMo-RL: mean and standard deviation of the other samples."""

    def one(i: int) -> float:
        rest = np.delete(r, i)
        deviation = r[i] - rest.mean()
        spread = rest.std(ddof=1) if len(rest) > 1 else 0.0
        return float(deviation / (spread + 1e-6) if spread > 0 else deviation)

    return np.array([one(i) for i in range(len(r))])


def whitened(x: Array, lengths: Array) -> Array:
    """verl: over tokens, written out as one number a token."""
    tokens = np.repeat(x, lengths)
    if len(tokens) < 2 or np.ptp(tokens) == 0:
        return np.zeros_like(x)
    return (x - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)


def over_batch(x: Array, epsilon: float) -> Array:
    return np.zeros_like(x) if np.ptp(x) == 0 else (x - x.mean()) / (x.std(ddof=1) + epsilon)


CASES = range(24)


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("variant", ["trl", "verl", "nemo", "nemo, all samples", "sum_then_normalize"])
def test_gdpo(seed: int, weighted: bool, variant: str) -> None:
    whole = draw(seed)
    scores, group, lengths = (x.double().numpy() if x.is_floating_point() else x.numpy() for x in whole)
    c = np.linspace(0.5, 2.0, len(scores)) if weighted else np.ones(len(scores))
    expected = {
        "trl": lambda: over_batch(c @ by_prompt(scores, group, standard(1e-4)), 1e-4),
        "verl": lambda: whitened(c @ by_prompt(scores, group, standard(1e-6)), lengths),
        "nemo": lambda: over_batch(c @ by_prompt(scores, group, of_others), 0.0),
        "nemo, all samples": lambda: over_batch(c @ by_prompt(scores, group, standard(1e-6)), 0.0),
        "sum_then_normalize": lambda: by_prompt((c @ scores)[None], group, standard(1e-4))[0],
    }[variant]()
    name, _, others = variant.partition(", ")
    options = {"weights": c.tolist()} if weighted else {}
    found = build("gdpo", variant=name, leave_one_out=not others, **options)(*whole)
    # What is left of a difference that rounding decides is compared with the size of its terms.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=EXACT * max(1.0, np.abs(expected).max()))


def test_token_whitening_weighs_long_responses() -> None:
    """Of two responses, the long one is nearer to the mean over tokens."""
    scores_MB, group_B = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 0])
    by_token = build("gdpo", variant="verl")(scores_MB, group_B, torch.tensor([9, 1]))
    by_sample = build("gdpo", variant="trl")(scores_MB, group_B, torch.tensor([9, 1]))
    assert float(by_token[1] / by_token[0]) == pytest.approx(-9.0, rel=1e-9)
    assert float(by_sample[1] / by_sample[0]) == pytest.approx(-1.0, rel=1e-9)


@pytest.mark.parametrize("seed", CASES)
def test_mo_grpo_is_the_sum_of_what_is_normalised(seed: int) -> None:
    whole = draw(seed)
    scores, group = whole[0].double().numpy(), whole[1].numpy()
    expected = by_prompt(scores, group, standard(1e-4)).sum(axis=0)
    np.testing.assert_allclose(build("mo_grpo")(*whole).numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("k", [1e-4, 1.0, 50.0])
def test_rvpo(seed: int, k: float) -> None:
    """The formula; towards k = 0 the mean, for large k the minimum up to ln(M) / k."""
    whole = draw(seed)
    z = by_prompt(whole[0].double().numpy(), whole[1].numpy(), standard(1e-6))
    found = build("rvpo", k=k)(*whole).numpy()
    expected = -np.log(np.exp(-k * z).mean(axis=0)) / k
    # 1e-16 / k: ln of a number near 1.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 + 1e-15 / k)
    if k == 1e-4:
        # The next term is k var(z) / 2, and |z| < 3 here.
        np.testing.assert_allclose(found, z.mean(axis=0), rtol=0, atol=k * 9)
    assert (found >= z.min(axis=0) - 1e-9).all()
    assert (found <= z.min(axis=0) + np.log(len(z)) / k + 1e-9).all()


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("filtered", ["hard", "snr"])
@pytest.mark.parametrize("reweight", [True, False])
def test_gd2po(seed: int, filtered: str, reweight: bool) -> None:
    whole = draw(seed)
    group, lengths = whole[1].numpy(), whole[2].numpy()
    z = by_prompt(whole[0].double().numpy(), group, standard(1e-6))
    dropped = (z > 1e-8).any(axis=0) & (z < -1e-8).any(axis=0)
    if filtered == "snr":
        dropped &= np.abs(z.sum(axis=0)) < 0.8 * (np.abs(z).sum(axis=0) + 1e-8)
    kept = ~dropped
    summed = z.sum(axis=0)
    if reweight:
        summed = summed * np.array([kept[group == g].mean() for g in group])
    expected = np.zeros_like(summed)
    expected[kept] = whitened(summed[kept], lengths[kept])
    scalarizer = build("gd2po", filter=filtered, reweight=reweight)
    np.testing.assert_allclose(scalarizer(*whole).numpy(), expected, rtol=0, atol=1e-10)
    assert scalarizer.facts(*whole)["kept"] == pytest.approx(kept.mean())


def test_gd2po_with_two_opposed_objectives_keeps_nothing() -> None:
    scores_B = torch.tensor([1.0, 2.0, 4.0, 8.0])
    whole = torch.stack([scores_B, -scores_B]), torch.tensor([0, 0, 1, 1]), torch.tensor([3, 3, 3, 3])
    assert build("gd2po")(*whole).tolist() == [0.0, 0.0, 0.0, 0.0]
