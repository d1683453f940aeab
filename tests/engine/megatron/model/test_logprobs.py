"""Log-probabilities of what was sampled, and the policy gradient that comes of them, in float64 by others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.generation.logits_process import LogitsProcessorList

from gapo_mega import aggregation
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.model import logprobs
from gapo_mega.engine.megatron.model.logprobs import (
    Backwards,
    Distribution,
    before_response,
    logprobs_of,
)
from gapo_mega.losses import Ppo
from gapo_mega.measuring.allocation import measure_allocations
from gapo_mega.types import Experience, KeptTokens, TokenBatch
from tests.helpers.logits import response_logprobs
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.sampled import processors, random_kept, sampled_distributions, sampled_logprobs
from tests.helpers.tiny import tiny_llama

VOCABULARY, PADDED = 101, 128
ROWS, COLUMNS = 6, 15
SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.7},
    "penalty": {"repetition_penalty": 1.3},
    "paper": {"temperature": 0.7, "repetition_penalty": 1.05},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "everything": {"temperature": 0.7, "repetition_penalty": 1.3, "top_k": 4, "top_p": 0.9},
}


def chain_of(sampling: dict[str, Any]) -> LogitsProcessorList:
    return processors(**{name.removeprefix("repetition_"): value for name, value in sampling.items()})


@pytest.fixture(scope="module")
def _world() -> Iterator[None]:
    worlds.enter(1, 1)
    yield
    worlds.leave()


# -- the function of logits ----------------------------------------------------------------------------
def random_batch(kept: bool) -> tuple[TokenBatch, Tensor | None]:
    """Prompts and responses of several lengths, many tokens twice; and what is dropped."""
    generator = torch.Generator().manual_seed(4)
    tokens_BT = torch.randint(0, VOCABULARY, (ROWS, COLUMNS), generator=generator)
    tokens_BT[:, 3::4] = tokens_BT[:, :1]
    prompt_B = torch.randint(1, 5, (ROWS, 1), generator=generator)
    end_B = torch.randint(6, COLUMNS + 1, (ROWS, 1), generator=generator)
    mask_BT = (torch.arange(COLUMNS) >= prompt_B) & (torch.arange(COLUMNS) < end_B)
    tokens, dropped_BTV = random_kept(tokens_BT, mask_BT, VOCABULARY, 0.2)
    if kept:
        return TokenBatch(tokens_BT, mask_BT, kept=tokens), dropped_BTV
    return TokenBatch(tokens_BT, mask_BT), None


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_values_and_gradients_are_those_of_transformers(
    temperature: float, penalty: float, kept: bool, dtype: torch.dtype
) -> None:
    batch, dropped_BTV = random_batch(kept)
    generator = torch.Generator().manual_seed(6)
    logits_BTV = (3 * torch.randn(ROWS, COLUMNS, PADDED, generator=generator)).to(dtype).requires_grad_()
    before_BTV = logits_BTV.detach().clone()
    weight_BT = torch.randn(ROWS, COLUMNS, generator=generator)

    found_BT = response_logprobs(logits_BTV, batch, Distribution(VOCABULARY, temperature, penalty))
    (first,) = torch.autograd.grad((found_BT * weight_BT).sum(), logits_BTV, retain_graph=True)
    (again,) = torch.autograd.grad((found_BT * weight_BT).sum(), logits_BTV)

    own_BTV = before_BTV[..., :VOCABULARY].double().requires_grad_()
    chain = processors(temperature, penalty)
    expected_BT = sampled_logprobs(own_BTV, batch.tokens_BT, chain, dropped_BTV) * batch.response_mask_BT
    (expected,) = torch.autograd.grad((expected_BT * weight_BT).sum(), own_BTV)

    assert torch.equal(logits_BTV.detach(), before_BTV)
    # float32 of log-probabilities up to 20.
    torch.testing.assert_close(found_BT.double(), expected_BT, rtol=1e-6, atol=5e-6)
    assert torch.equal(first, again)
    assert not first[..., VOCABULARY:].any()
    # float32; bf16 rounds the result to 8 bits.
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    error = (first[..., :VOCABULARY].double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= rounding


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_backward_gives_the_same_and_is_the_only_one(dtype: torch.dtype) -> None:
    batch, _ = random_batch(kept=True)
    generator = torch.Generator().manual_seed(6)
    count = int(batch.response_mask_BT.sum())
    logits_NV = (3 * torch.randn(count, PADDED, generator=generator)).to(dtype)
    weight_BT = torch.randn(ROWS, COLUMNS, generator=generator)
    distribution = Distribution(VOCABULARY, 0.7, 1.3)

    def total(one_backward: bool) -> tuple[Tensor, Tensor]:
        own_NV = logits_NV.clone().requires_grad_()
        found_BT = logprobs_of(own_NV, batch, distribution, Backwards(last=one_backward))
        return (found_BT * weight_BT).sum(), own_NV

    value, own_NV = total(one_backward=True)
    (found,) = torch.autograd.grad(value, own_NV, retain_graph=True)
    many, other_NV = total(one_backward=False)
    (expected,) = torch.autograd.grad(many, other_NV)
    assert torch.equal(value, many) and torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, own_NV)


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3 * PADDED, 2**23])
@pytest.mark.parametrize("kept", [False, True])
def test_entropies_and_their_gradients_are_those_of_transformers(
    kept: bool, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside log-probabilities in one loss; in one backward and in several."""
    monkeypatch.setattr(logprobs, "_CHUNK", chunk)
    batch, dropped_BTV = random_batch(kept)
    mask_BT = batch.response_mask_BT
    generator = torch.Generator().manual_seed(8)
    logits_BTV = (3 * torch.randn(ROWS, COLUMNS, PADDED, generator=generator)).to(dtype)
    weight_BX = torch.randn(ROWS, 2 * COLUMNS, generator=generator)
    found: list[tuple[Tensor, Tensor]] = []
    for last in (False, True):
        own_BTV = logits_BTV.clone().requires_grad_()
        policy_BX = logprobs_of(
            before_response(own_BTV, mask_BT),
            batch,
            Distribution(VOCABULARY, 0.7, 1.3),
            Backwards(last=last),
            "trained",
        )
        found.append((policy_BX.detach(), torch.autograd.grad((policy_BX * weight_BX).sum(), own_BTV)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    exact_BTV = logits_BTV[..., :VOCABULARY].double().requires_grad_()
    chain = processors(0.7, 1.3)
    logs_BTV = sampled_distributions(exact_BTV, batch.tokens_BT, chain, dropped_BTV)
    chosen_BT = logs_BTV.gather(-1, batch.tokens_BT[:, :, None]).squeeze(-1)
    entropy_BT = -(logs_BTV.exp() * logs_BTV.masked_fill(logs_BTV.isinf(), 0.0)).sum(dim=-1)
    expected_BX = torch.cat([chosen_BT * mask_BT, entropy_BT * mask_BT], dim=1)
    (expected,) = torch.autograd.grad((expected_BX * weight_BX).sum(), exact_BTV)
    policy_BX, gradient = found[0]
    # float32 of log-probabilities up to 20.
    torch.testing.assert_close(policy_BX.double(), expected_BX, rtol=1e-6, atol=5e-6)
    # float32; bf16 rounds the result to 8 bits.
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    error = (gradient[..., :VOCABULARY].double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= rounding
    assert not gradient[..., VOCABULARY:].any()


@pytest.mark.usefixtures("_world")
def test_a_measured_entropy_has_no_gradient() -> None:
    batch, _ = random_batch(kept=True)
    generator = torch.Generator().manual_seed(9)
    count = int(batch.response_mask_BT.sum())
    logits_NV = torch.randn(count, PADDED, generator=generator, requires_grad=True)
    policy_BX = logprobs_of(logits_NV * 1, batch, Distribution(VOCABULARY), entropy="measured")
    plain_BT = logprobs_of(logits_NV * 1, batch, Distribution(VOCABULARY))
    values_BT, entropy_BT = policy_BX.chunk(2, dim=1)
    assert torch.equal(values_BT, plain_BT) and bool((entropy_BT[batch.response_mask_BT] > 0).all())
    (found,) = torch.autograd.grad(policy_BX.sum(), logits_NV)
    (expected,) = torch.autograd.grad(plain_BT.sum(), logits_NV)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize(("one_backward", "tensors"), [(True, 0), (False, 1)])
def test_no_tensor_of_the_logits_size_without_need(one_backward: bool, tensors: int) -> None:
    """In float32 the logits become the probabilities and, in the only backward, the gradient."""
    mask_BT = torch.ones(2, 101, dtype=torch.bool)
    mask_BT[:, 0] = False
    batch = TokenBatch(torch.ones(2, 101, dtype=torch.int64), mask_BT)
    logits_NV = torch.randn(200, 4096, requires_grad=True)
    with measure_allocations("cpu") as found:
        value = logprobs_of(logits_NV, batch, Distribution(4096), Backwards(last=one_backward)).sum()
        (grad,) = torch.autograd.grad(value, logits_NV)
    size = logits_NV.numel() * 4
    assert grad.shape == logits_NV.shape
    # Some numbers a token, a few per cent of 4096 logits a token.
    assert tensors * size <= found.peak_bytes <= (tensors + 0.1) * size


# -- a policy whose responses can be counted -----------------------------------------------------------
class Outcomes(NamedTuple):
    """Every response to one prompt, of one or two tokens; token 0 ends it."""

    tokens_BT: Tensor
    mask_BT: Tensor
    rewards_B: Tensor


SMALL, PROMPT = 6, [3, 4, 3]


def outcomes() -> Outcomes:
    responses = [[0, 0], *map(list, itertools.product(range(1, SMALL), range(SMALL)))]
    tokens_BT = torch.tensor([PROMPT + response for response in responses])
    mask_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    mask_BT[:, len(PROMPT) :] = True
    mask_BT[0, -1] = False
    rewards_B = torch.randn(len(responses), generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return Outcomes(tokens_BT, mask_BT, rewards_B)


def dropped_by(model: LlamaForCausalLM, found: Outcomes, chain: LogitsProcessorList) -> Tensor:
    """What top-k and top-p leave out at every position [B, T, V]."""
    with torch.no_grad():
        logits_BTV = model(found.tokens_BT).logits
    dropped_BTV = torch.zeros(*found.tokens_BT.shape, SMALL, dtype=torch.bool)
    for position in range(1, found.tokens_BT.shape[1]):
        scores_BV = chain(found.tokens_BT[:, :position], logits_BTV[:, position - 1])
        dropped_BTV[:, position] = scores_BV.isinf()
    return dropped_BTV & found.mask_BT[..., None]


def exact_gradient(
    model: LlamaForCausalLM, found: Outcomes, sampling: dict[str, Any], dropped_BTV: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the expected reward of what is sampled, by adding up all responses; and their probabilities."""
    plain = {name: value for name, value in sampling.items() if not name.startswith("top_")}
    logprobs_BT = sampled_logprobs(
        model(found.tokens_BT).logits, found.tokens_BT, chain_of(plain), dropped_BTV
    )
    logprobs_BT = torch.where(found.mask_BT, logprobs_BT, 0.0)
    probability_B = logprobs_BT.sum(dim=1).exp()
    assert float(probability_B.sum()) == pytest.approx(1.0, abs=1e-12)
    expected = (probability_B * found.rewards_B).sum()
    grads = torch.autograd.grad(expected, list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads]), probability_B.detach()


def flat(directory: Path) -> Tensor:
    model = LlamaForCausalLM.from_pretrained(directory).double()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_policy_gradient_is_that_of_the_expected_reward(tmp_path: Path, name: str) -> None:
    """Every response once, weighted with its probability: no sampling noise is left.

    With log-probabilities at temperature 1 for responses at 0.7 the gradient is off by a tenth.
    """
    sampling, found, rate = SAMPLINGS[name], outcomes(), 0.05
    # Far from uniform, so that cuts and penalties have something to do.
    model = tiny_llama(tmp_path / "model", vocab=SMALL, initializer_range=0.5, seed=2).double()
    dropped_BTV = dropped_by(model, found, chain_of(sampling))
    expected, probability_B = exact_gradient(model, found, sampling, dropped_BTV)

    kept_BTV = ~dropped_BTV & found.mask_BT[..., None]
    possible_B = probability_B > 0
    assert bool((~possible_B).any()) == ("top_" in name or name == "everything")
    engine = _engine(tmp_path / "model", sampling, rate)
    batch = _weighted(engine, found, probability_B, kept_BTV).select(possible_B.nonzero()[:, 0])
    report = engine.update_policy(batch, Ppo(), aggregation.build("weighted_sum", weights=[1.0]))
    engine.export_hf(tmp_path / "after")
    worlds.leave()

    tokens = int(batch.response_mask_BT.sum())
    got = (flat(tmp_path / "after") - flat(tmp_path / "model")) / rate * tokens
    # What fp32 leaves of the difference of parameters of size 1 that change by 1e-4.
    assert float((got - expected).norm() / expected.norm()) <= 2e-3
    assert not report.skipped


def _engine(model: Path, sampling: dict[str, Any], rate: float) -> MegatronEngine:
    config = check_engine.make_config(
        str(model),
        {},
        {"name": "sgd", "distributed": False, "lr": rate},
        micro_batch_size=64,
        rollout={"prompts_per_step": 1, "samples_per_prompt": 64, **sampling},
        objectives=[{"name": "reward", "function": "m:f"}],
    )
    return check_engine.build_engine(config)


def _weighted(engine: MegatronEngine, found: Outcomes, probability_B: Tensor, kept_BTV: Tensor) -> Experience:
    """The batch whose advantages are reward times probability; checks the log-probabilities, too."""
    counts_BT, tokens_K = kept_BTV.sum(dim=-1), kept_BTV.nonzero()[:, 2].int()
    batch = TokenBatch(found.tokens_BT, found.mask_BT, kept=KeptTokens(counts_BT, tokens_K))
    own_BT = engine.logprobs(batch, "policy")
    reference_BT = engine.logprobs(batch, "reference")
    # fp32 through four layers, with logits up to 30.
    torch.testing.assert_close(own_BT.sum(dim=1).exp().double(), probability_B, rtol=1e-4, atol=1e-9)
    assert torch.equal(own_BT, reference_BT)
    advantages_B = (found.rewards_B * probability_B).float()
    empty_BT = torch.zeros(found.tokens_BT.shape)
    return Experience(
        tokens_BT=found.tokens_BT,
        response_mask_BT=found.mask_BT,
        kept=batch.kept,
        group_B=torch.zeros(len(advantages_B), dtype=torch.int64),
        old_logprobs_BT=own_BT,
        ref_logprobs_BT=reference_BT,
        scores_MB=advantages_B[None],
        token_rewards_MBT=empty_BT[None],
        advantages_MBT=(advantages_B[:, None] * found.mask_BT)[None],
    )


def test_the_generator_keeps_what_transformers_keeps(tmp_path: Path) -> None:
    """And draws every response as often as its probability says."""
    sampling, found, draws = SAMPLINGS["everything"], outcomes(), 4000
    model = tiny_llama(tmp_path / "model", vocab=SMALL, initializer_range=0.5, seed=2).double()
    dropped_BTV = dropped_by(model, found, chain_of(sampling))
    _, probability_B = exact_gradient(model, found, sampling, dropped_BTV)
    engine = _engine(tmp_path / "model", sampling, 0.05)
    engine.generator._eos_ids = torch.tensor([0])
    generation = engine.generator.generate([PROMPT] * draws, SamplingParameters(2, **sampling), seed=3)
    worlds.leave()
    assert generation.kept is not None
    numbers = {tuple(row): index for index, row in enumerate(found.tokens_BT.tolist())}
    rows_B = torch.tensor([numbers[tuple(row)] for row in generation.tokens_BT.tolist()])
    counts_B = torch.bincount(rows_B, minlength=len(found.tokens_BT))
    assert not counts_B[probability_B == 0].any()
    # Five standard deviations of a binomial count.
    bound_B = 5 * (draws * probability_B * (1 - probability_B)).sqrt() + 1
    assert bool(((counts_B - draws * probability_B).abs() < bound_B).all())
    expected_BTV = (~dropped_BTV & found.mask_BT[..., None])[rows_B]
    assert torch.equal(generation.kept.counts_BT, expected_BTV.sum(dim=-1))
    assert torch.equal(generation.kept.tokens_K, expected_BTV.nonzero()[:, 2].int())
