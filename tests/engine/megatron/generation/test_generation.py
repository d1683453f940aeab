"""Generation in one process against transformers' ``generate`` and against the training forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gapo_mega.config import OptimizerConfig
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.model.forward import run_model
from gapo_mega.engine.megatron.model.logprobs import Distribution
from gapo_mega.engine.megatron.model.optimizer import make_trainable
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.types import Generation, TokenBatch
from tests.helpers.generating import MODELS, VOCABULARY, generator, load
from tests.helpers.logits import response_logprobs
from tests.helpers.ranks import worlds
from tests.helpers.tiny import tiny_llama, tiny_mistral

Pair = tuple[PreTrainedModel, GPTModel]
LENGTHS = (5, 1, 9, 7, 3, 9, 2)
GREEDY = SamplingParameters(max_new_tokens=12, temperature=0.0)
SAMPLED = SamplingParameters(max_new_tokens=12)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[groups.Groups]:
    yield worlds.enter(1, 1)
    worlds.leave()


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    return MODELS[request.param](folder), load(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GPTModel:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(folder, vocab=VOCABULARY)
    return load(folder)


def random_prompts(vocabulary: int = VOCABULARY, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, vocabulary, (n,), generator=source).tolist() for n in lengths]
    return [*prompts, prompts[2]]  # one of them twice


def row(generation: Generation, index: int) -> list[int]:
    """Prompt and response of a row, without padding."""
    end = int(generation.prompt_lengths_B[index] + generation.response_mask_BT[index].sum())
    tokens: list[int] = generation.tokens_BT[index, :end].tolist()
    return tokens


def transformers_row(
    model: PreTrainedModel, prompt: list[int], eos_ids: list[int] | None = None, **options: Any
) -> list[int]:
    """Greedy, one row at a time: in a padded batch transformers also penalises the padding token."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": eos_ids, "pad_token_id": 0, **options}
    found: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return found


def training_logprobs(
    model: GPTModel, generation: Generation, sampling: SamplingParameters, vocabulary: int = VOCABULARY
) -> Tensor:
    batch = TokenBatch(generation.tokens_BT, generation.response_mask_BT, kept=generation.kept)
    with megatron_device(), torch.no_grad():
        logits_BTV = run_model(model, generation.tokens_BT, 1)
        return response_logprobs(logits_BTV, batch, Distribution.of(vocabulary, sampling))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(pair: Pair, world: groups.Groups, penalty: float) -> None:
    reference, model = pair
    prompts = random_prompts()
    sampling = SamplingParameters(12, temperature=0.0, repetition_penalty=penalty)
    generation = generator(model, world).generate(prompts, sampling, seed=0)
    for index, prompt in enumerate(prompts):
        expected = transformers_row(reference, prompt, max_new_tokens=12, repetition_penalty=penalty)
        assert row(generation, index) == expected
    assert not generation.finished_B.any()


def test_responses_end_where_those_of_transformers_end(pair: Pair, world: groups.Groups) -> None:
    reference, model = pair
    prompts = random_prompts()
    eos_ids = list(range(4, VOCABULARY, 8))
    generation = generator(model, world, eos_ids=eos_ids, pad_id=1).generate(prompts, GREEDY, seed=0)
    lengths = set()
    for index, prompt in enumerate(prompts):
        expected = transformers_row(reference, prompt, eos_ids, max_new_tokens=12)
        assert row(generation, index) == expected
        assert bool(generation.finished_B[index]) == (expected[-1] in eos_ids)
        assert (generation.tokens_BT[index, len(expected) :] == 1).all()
        lengths.add(len(expected) - len(prompt))
    assert len(lengths) > 1
    off_BT = ~generation.response_mask_BT
    assert (generation.logprobs_BT[off_BT] == 0).all()
    assert (generation.logprobs_BT[~off_BT] < 0).all()
    ends_B = generation.prompt_lengths_B + generation.response_mask_BT.sum(dim=1)
    assert generation.tokens_BT.shape[1] == ends_B.max()


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLED,
        SamplingParameters(12, temperature=0.7, repetition_penalty=1.05),
        SamplingParameters(12, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2),
    ],
)
def test_log_probabilities_equal_the_training_forward(
    pair: Pair, world: groups.Groups, sampling: SamplingParameters
) -> None:
    _, model = pair
    generation = generator(model, world, eos_ids=[7, 8, 9, 10]).generate(random_prompts(), sampling, seed=5)
    # fp32 with and without cache, left against right padding: measured at 4e-6.
    expected_BT = training_logprobs(model, generation, sampling)
    torch.testing.assert_close(generation.logprobs_BT, expected_BT, rtol=0, atol=1e-4)


def test_sampling_depends_on_seed_and_row_only(model: GPTModel, world: groups.Groups) -> None:
    prompts = random_prompts()
    runs = [
        generator(model, world, eos_ids=[5, 6], batch_size=size).generate(prompts, SAMPLED, seed=11)
        for size in (1, 3, 64)
    ]
    for run in runs[1:]:
        assert torch.equal(run.tokens_BT, runs[0].tokens_BT)
        assert torch.equal(run.response_mask_BT, runs[0].response_mask_BT)
    first = generator(model, world, eos_ids=[5, 6]).generate(prompts[:2], SAMPLED, seed=11)
    assert [row(first, 0), row(first, 1)] == [row(runs[0], 0), row(runs[0], 1)]
    other = generator(model, world, eos_ids=[5, 6]).generate(prompts, SAMPLED, seed=12)
    assert [row(other, i) for i in range(8)] != [row(runs[0], i) for i in range(8)]
    assert row(runs[0], 2) != row(runs[0], 7)  # the same prompt twice


def test_rows_with_the_same_prompt_after_padding_stay_apart(model: GPTModel, world: groups.Groups) -> None:
    """[7, 9] on the left of [7, 7, 9] is filled with its own token: still another prompt."""
    prompts = [[7, 9], [7, 7, 9], [7], [7, 7]]
    together = generator(model, world).generate(prompts, GREEDY, seed=0)
    for index, prompt in enumerate(prompts):
        alone = generator(model, world).generate([prompt], GREEDY, seed=0)
        assert row(together, index) == row(alone, 0)
    expected_BT = training_logprobs(model, together, GREEDY)
    torch.testing.assert_close(together.logprobs_BT, expected_BT, rtol=0, atol=1e-4)


def test_first_tokens_follow_the_softmax_of_the_model(model: GPTModel, world: groups.Groups) -> None:
    """Padded vocabulary entries take no probability, and a hot draw never picks one."""
    draws = 4000
    one = SamplingParameters(1, temperature=3.0)
    generation = generator(model, world, batch_size=draws).generate([[5, 6, 7]] * draws, one, seed=2)
    with megatron_device(), torch.no_grad():
        logits_V = run_model(model, torch.tensor([[5, 6, 7]]), 1)[0, -1, :VOCABULARY]
    expected_V = (logits_V / 3.0).softmax(dim=-1)
    counts_V = torch.bincount(generation.tokens_BT[:, 3], minlength=VOCABULARY)
    assert len(counts_V) == VOCABULARY
    # Five standard deviations of a binomial count, over 101 counts with a fixed seed.
    bound_V = 5 * (draws * expected_V * (1 - expected_V)).sqrt() + 1
    assert ((counts_V - draws * expected_V).abs() < bound_V).all()


def test_one_new_token(model: GPTModel, world: groups.Groups) -> None:
    generation = generator(model, world).generate([[5], [6, 7]], SamplingParameters(1), seed=0)
    assert generation.tokens_BT.shape == (2, 3)
    assert generation.response_mask_BT.tolist() == [[False, True, False], [False, False, True]]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before(tmp_path: Path, world: groups.Groups, training: bool) -> None:
    """Mode, window and gradients: a step after generating equals the step without it."""
    tiny_mistral(tmp_path, vocab=VOCABULARY, window=4)
    # Beyond the window, and as long as what is generated: Megatron caches rotary tables by length.
    batches = [torch.randint(3, VOCABULARY, (2, columns)) for columns in (17, 4)]

    def gradient(model: GPTModel) -> list[Tensor]:
        model.zero_grad()
        with megatron_device():
            for tokens_BT in batches:
                run_model(model, tokens_BT, 1).float().square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradient(load(tmp_path))
    model = load(tmp_path).train(training)
    generator(model, world).generate([[5], [6, 7]], SamplingParameters(2), seed=0)
    assert model.training == training
    for mine, theirs in zip(gradient(model), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_wrapped_model_shares_its_weights(tmp_path: Path, world: groups.Groups) -> None:
    tiny_llama(tmp_path, vocab=VOCABULARY)
    with megatron_device():
        trainable = make_trainable([load(tmp_path)], OptimizerConfig(), total_steps=1)
    generate = generator(trainable.model.module, world)
    before = generate.generate(random_prompts(), GREEDY, seed=0)
    with torch.no_grad():
        for parameter in trainable.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    generate.update_weights()
    after = generate.generate(random_prompts(), GREEDY, seed=0)
    assert not torch.equal(before.tokens_BT, after.tokens_BT)
    expected_BT = training_logprobs(trainable.model.module, after, GREEDY)
    torch.testing.assert_close(after.logprobs_BT, expected_BT, rtol=0, atol=1e-4)
    assert trainable.model.training


def test_a_sliding_window_bounds_the_sequence(tmp_path: Path, world: groups.Groups) -> None:
    tiny_mistral(tmp_path, vocab=VOCABULARY, window=16)
    generate = generator(load(tmp_path), world)
    with pytest.raises(ValueError, match=r"max_new_tokens: found 10 after a prompt of 7 tokens.* at most 16"):
        generate.generate([[5], [6] * 7], SamplingParameters(10), seed=0)
    assert generate.generate([[5], [6] * 7], SamplingParameters(9), seed=0).tokens_BT.shape == (2, 16)


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([], SAMPLED, "prompts: found none"),
        ([[1], []], SAMPLED, "prompts: found no token in prompt 1"),
        ([[1]], SamplingParameters(0), "sampling.max_new_tokens: found 0"),
    ],
)
def test_errors_name_what_was_found(
    model: GPTModel,
    world: groups.Groups,
    prompts: list[list[int]],
    sampling: SamplingParameters,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        generator(model, world).generate(prompts, sampling, seed=0)


def test_a_pretrained_model_continues_as_in_transformers(world: groups.Groups, smollm2: Path) -> None:
    """SmolLM2: 30 layers, 9 heads in 3 groups, tied, vocabulary of 49152."""
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    vocabulary = reference.config.vocab_size
    prompts = [[504, 3575, 282], [9690, 198, 2683, 359, 253], [788, 28]]
    generate = generator(load(smollm2), world, vocabulary=vocabulary, batch_size=8)
    for penalty in (1.0, 1.2):
        sampling = SamplingParameters(16, temperature=0.0, repetition_penalty=penalty)
        generation = generate.generate(prompts, sampling, seed=0)
        for index, prompt in enumerate(prompts):
            expected = transformers_row(reference, prompt, max_new_tokens=16, repetition_penalty=penalty)
            assert row(generation, index) == expected
