"""What sums of losses are divided by, against means taken in NumPy over the whole minibatch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gapo_mega.losses import PolicyLoss, build, losses
from gapo_mega.losses.base import clips_of, normalization_of
from gapo_mega.losses.normalization import Normalization, ResponseCounts, divisor, total
from tests.helpers.policy_batches import COLUMNS, policy_batch

LONGEST = 13


def counts_of(mask_BT: torch.Tensor) -> ResponseCounts:
    lengths_B = mask_BT.sum(dim=1)
    return ResponseCounts(float(lengths_B.sum()), float((lengths_B > 0).sum()), LONGEST)


def by_numpy(values_BT: torch.Tensor, mask_BT: torch.Tensor, normalization: str) -> float:
    rows = [value[mask].numpy() for value, mask in zip(values_BT, mask_BT, strict=True) if mask.any()]
    if normalization == "token_mean":
        return float(np.concatenate(rows).mean())
    if normalization == "sequence_mean":
        return float(np.mean([row.mean() for row in rows]))
    return float(np.mean([row.sum() / LONGEST for row in rows]))


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_microbatches_add_up_to_the_mean_of_the_minibatch(normalization: Normalization, size: int) -> None:
    values_BT, batch = policy_batch(0)
    mask_BT = batch.response_mask_BT
    values_BT = values_BT * mask_BT
    parts = [
        total(*part, normalization) for part in zip(values_BT.split(size), mask_BT.split(size), strict=True)
    ]
    found = float(sum(parts)) / divisor(normalization, counts_of(mask_BT))
    # float64: about 30 additions in another order
    assert found == pytest.approx(by_numpy(values_BT, mask_BT, normalization), rel=1e-13)


def test_a_minibatch_without_a_response_token_divides_by_something() -> None:
    nothing = ResponseCounts(0.0, 0.0, LONGEST)
    assert divisor("token_mean", nothing) == divisor("sequence_mean", nothing) == 1.0
    assert divisor("fixed_length", nothing) == LONGEST


@pytest.mark.parametrize("name", sorted(losses()))
@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean", "fixed_length"])
def test_every_loss_takes_every_normalization(name: str, normalization: str) -> None:
    logprobs_BT, batch = policy_batch(1)
    loss = build(name, normalization=normalization)
    assert normalization_of(loss) == normalization
    # Of a row alone, sequence_mean is the sum over its length.
    row = torch.tensor([1])
    by_token = build(name, normalization="token_mean")(logprobs_BT[row], batch.select(row), 0)
    length = int(batch.response_mask_BT[1].sum()) if normalization == "sequence_mean" else 1
    found = loss(logprobs_BT[row], batch.select(row), 0)
    assert 1 < int(batch.response_mask_BT[1].sum()) < COLUMNS
    assert float(found) * length == pytest.approx(float(by_token), rel=1e-13)


def test_a_loss_or_function_that_says_nothing_is_a_mean_over_tokens() -> None:
    class Own(PolicyLoss):
        def __call__(self, logprobs_BT, batch, objective):  # type: ignore[no-untyped-def]
            return logprobs_BT.sum()

    assert normalization_of(Own()) == normalization_of(lambda x, _, __: x.sum()) == "token_mean"
    assert clips_of(Own()) == clips_of(lambda x, _, __: x.sum()) == ()
