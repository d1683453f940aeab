"""Token choice against transformers' logits processors, and draws against the softmax."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.generation import sampling

ROWS, VOCABULARY, HISTORY = 16, 97, 12
PLAIN = SamplingParameters(max_new_tokens=1)


def random_logits(seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def random_history(seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, HISTORY), generator=torch.Generator().manual_seed(seed))


def same_logits(found_BV: Tensor, expected_BV: Tensor) -> None:
    """Same cut exactly; kept values to one rounding, for a product may be formed in another order."""
    assert torch.equal(found_BV.isinf(), expected_BV.isinf())
    torch.testing.assert_close(found_BV, expected_BV, rtol=1e-6, atol=0)


@pytest.mark.parametrize("penalty", [0.7, 1.05, 1.5])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits_BV, history_BT = random_logits(), random_history()
    history_BT[:, 3] = history_BT[:, 5]  # repeated tokens are penalised once
    expected_BV = RepetitionPenaltyLogitsProcessor(penalty)(history_BT, logits_BV)
    found_BV = sampling.penalize_repetition(logits_BV, history_BT, penalty)
    same_logits(found_BV, expected_BV)
    assert not torch.equal(found_BV, logits_BV)


@pytest.mark.parametrize("k", [1, 2, 10, VOCABULARY, 10 * VOCABULARY])
def test_top_k_is_that_of_transformers(k: int) -> None:
    logits_BV = random_logits().round()  # rounded: many are equal, also to the k-th
    same_logits(sampling.keep_top_k(logits_BV, k), TopKLogitsWarper(k)(random_history(), logits_BV))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p: float) -> None:
    logits_BV = random_logits()
    same_logits(sampling.keep_top_p(logits_BV, p), TopPLogitsWarper(p)(random_history(), logits_BV))


def test_all_steps_happen_in_the_order_of_transformers() -> None:
    """The whole chain: its support and its probabilities, seen through draws on a fine grid."""
    parameters = SamplingParameters(1, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3)
    logits_BV, history_BT = random_logits(scale=2.0), random_history()
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.8),
        ]
    )
    expected_BV = chain(history_BT, logits_BV.clone()).softmax(dim=-1)
    points = 2000
    counts_BV = torch.zeros(ROWS, VOCABULARY)
    for uniform in (torch.arange(points, dtype=torch.float64) + 0.5) / points:
        choice = sampling.choose(logits_BV, history_BT, uniform.expand(ROWS), parameters)
        counts_BV[torch.arange(ROWS), choice.tokens_B] += 1
    # A grid of n points meets an interval of length q in n q points, give or take one.
    assert (counts_BV - points * expected_BV).abs().max() <= 1.01
    assert torch.equal(counts_BV > 0, expected_BV > 0)
    assert choice.kept_BV is not None and torch.equal(choice.kept_BV, expected_BV > 0)


def test_greedy_takes_the_largest_penalised_logit() -> None:
    logits_BV = random_logits()
    history_BT = logits_BV.argmax(dim=-1, keepdim=True).expand(-1, HISTORY)
    greedy = SamplingParameters(1, temperature=0.0, top_k=3, top_p=0.5, repetition_penalty=50.0)
    tokens_B, logprobs_B, kept_BV = sampling.choose(logits_BV, history_BT, torch.zeros(ROWS), greedy)
    penalized_BV = RepetitionPenaltyLogitsProcessor(50.0)(history_BT, logits_BV)
    assert torch.equal(tokens_B, penalized_BV.argmax(dim=-1))
    assert kept_BV is None
    # One rounding of logits up to 10.
    torch.testing.assert_close(logprobs_B, penalized_BV.log_softmax(-1).amax(-1), rtol=1e-6, atol=1e-5)
    assert not torch.equal(tokens_B, logits_BV.argmax(dim=-1))


def test_draws_follow_the_softmax() -> None:
    draws = 20_000
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(3))
    uniform_B = sampling.uniform_numbers(seed=5, rows=draws, steps=1)[:, 0]
    tokens_B = sampling.choose(
        logits_V.expand(draws, -1), torch.zeros(draws, 1, dtype=torch.int64), uniform_B, PLAIN
    ).tokens_B
    counts_V = np.bincount(tokens_B.numpy(), minlength=50)
    expected_V = logits_V.double().softmax(dim=-1).numpy() * draws
    # At the 1 % level for this fixed seed; cells this small are still in chi-square's range.
    assert expected_V.min() > 5
    assert stats.chisquare(counts_V, expected_V).pvalue > 0.01


def test_tokens_without_probability_are_never_drawn() -> None:
    logits_BV = torch.full((4, 6), -torch.inf)
    logits_BV[:, 2] = 0.0
    ends = torch.tensor([0.0, 0.5, 1 - 2.0**-53, 2.0**-60], dtype=torch.float64)
    assert sampling.draw(logits_BV, ends)[0].tolist() == [2, 2, 2, 2]


def test_the_last_token_can_be_drawn_and_nothing_beyond_it() -> None:
    logits_BV = torch.zeros(2, 49_152)
    tokens_B, _ = sampling.draw(logits_BV, torch.tensor([1 - 2.0**-53, 0.0], dtype=torch.float64))
    assert tokens_B.tolist() == [49_151, 0]


@pytest.mark.parametrize("vocabulary", [97, 256, 257, 1000, 4096])
def test_draws_over_blocks_are_those_over_the_whole_vocabulary(vocabulary: int) -> None:
    """numpy's search in the running sum of all weights; some tokens and blocks have no probability."""
    generator = torch.Generator().manual_seed(2)
    logits_V = 3 * torch.randn(vocabulary, generator=generator)
    logits_V[torch.rand(vocabulary, generator=generator) < 0.3] = -torch.inf
    logits_V[: vocabulary // 9] = logits_V[-(vocabulary // 9) :] = -torch.inf
    logits_V[vocabulary // 3 : vocabulary // 3 + 600 if vocabulary > 2000 else 0] = -torch.inf
    inside = torch.rand(3000, generator=generator, dtype=torch.float64)
    ends = torch.tensor([0.0, 2.0**-60, 1 - 2.0**-53], dtype=torch.float64)
    tokens_B, totals_B = sampling.draw(logits_V.expand(3003, -1), torch.cat([inside, ends]))
    weights_V = np.exp(logits_V.double().numpy())
    running_V = np.cumsum(weights_V)
    expected_B = np.searchsorted(running_V, inside.numpy() * running_V[-1], side="right")
    # fp32 weights: an edge of the grid may lie on the other side of a number.
    assert np.mean(tokens_B.numpy()[:3000] != expected_B) <= 1e-3
    possible = np.flatnonzero(weights_V)
    assert tokens_B[3000:].tolist() == [possible[0], possible[0], possible[-1]]
    assert set(tokens_B.tolist()) <= set(possible.tolist())
    expected = torch.logsumexp(logits_V.double(), 0).expand(3003)
    torch.testing.assert_close(totals_B.double(), expected, rtol=1e-6, atol=0)  # float32


def test_log_probabilities_are_of_what_was_sampled() -> None:
    logits_BV, history_BT = random_logits(), random_history()
    uniform_B = sampling.uniform_numbers(seed=1, rows=ROWS, steps=1)[:, 0]
    parameters = SamplingParameters(1, temperature=0.5, top_k=5, top_p=0.9, repetition_penalty=1.2)
    before_BV = logits_BV.clone()
    tokens_B, logprobs_B, _ = sampling.choose(logits_BV, history_BT, uniform_B, parameters)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.5),
            TopKLogitsWarper(5),
            TopPLogitsWarper(0.9),
        ]
    )
    expected_B = chain(history_BT, before_BV).log_softmax(dim=-1)[torch.arange(ROWS), tokens_B]
    # log_softmax subtracts the maximum first; both lose a few last bits of values up to 10.
    torch.testing.assert_close(logprobs_B, expected_B, rtol=1e-6, atol=1e-5)
    assert torch.equal(logits_BV, before_BV)


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits_BV, history_BT = random_logits(), random_history()
    uniform_B = sampling.uniform_numbers(seed=7, rows=ROWS, steps=1)[:, 0]
    together_B = sampling.choose(logits_BV, history_BT, uniform_B, PLAIN).tokens_B
    for row in range(ROWS):
        own = slice(row, row + 1)
        alone = sampling.choose(logits_BV[own], history_BT[own], uniform_B[own], PLAIN)
        assert alone.tokens_B.item() == together_B[row].item()


def test_uniform_numbers_are_keyed_by_seed_and_row() -> None:
    numbers_BS = sampling.uniform_numbers(seed=9, rows=6, steps=4)
    assert torch.equal(sampling.uniform_numbers(seed=9, rows=3, steps=7)[:, :4], numbers_BS[:3])
    assert not torch.equal(sampling.uniform_numbers(seed=10, rows=6, steps=4), numbers_BS)
    assert len(numbers_BS.unique()) == numbers_BS.numel()
    largest, negative = (sampling.uniform_numbers(seed, rows=1, steps=1) for seed in (2**64 - 2, -1))
    assert not torch.equal(largest, negative)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.{name}: found {value}"):
        sampling.check(dataclasses.replace(PLAIN, **{name: value}))
