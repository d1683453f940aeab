"""Our decoder against the training forward, against transformers, and against Megatron's layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import PreTrainedModel

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.generation import layers
from gapo_mega.engine.megatron.generation.chunk import Chunk
from gapo_mega.engine.megatron.generation.decoder import Decoder
from gapo_mega.engine.megatron.generation.megatron_layers import MegatronLayers, inference_state
from gapo_mega.engine.megatron.model.forward import run_model
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from tests.helpers.generating import MODELS, VOCABULARY, generator, load, make_unknown
from tests.helpers.ranks import worlds
from tests.helpers.tiny import tiny_llama, tiny_llama3, tiny_qwen3

PROMPTS = (7, 1, 4)  # lengths
INVERSE = [0, 0, 1, 2, 2]  # the prompt of every row
NEW = 5
GREEDY = SamplingParameters(max_new_tokens=8, temperature=0.0)
# fp32 sums in another order, relative to the largest logit; measured at 2e-6.
CLOSE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[groups.Groups]:
    yield worlds.enter(1, 1)
    worlds.leave()


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    MODELS[request.param](made)
    return made


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(6))


def decoded(chunk: Chunk, lengths: tuple[int, ...] = PROMPTS) -> tuple[list[Tensor], list[list[int]]]:
    """Logits ``[B, V]`` after the prompts and after every one of some further tokens; the rows' tokens."""
    columns = max(lengths)
    padding_U = columns - torch.tensor(lengths)
    tokens_US, further_BN = random_tokens(len(lengths), columns), random_tokens(len(INVERSE), NEW)
    inverse_B = torch.tensor(INVERSE)
    logits_UV, state = chunk.prefill(tokens_US, padding_U, inverse_B, columns + NEW)
    found = [logits_UV[inverse_B]]
    found += [state.decode(further_BN[:, step : step + 1]) for step in range(NEW)]
    rows = [
        [*tokens_US[prompt, padding_U[prompt] :].tolist(), *further_BN[row].tolist()]
        for row, prompt in enumerate(INVERSE)
    ]
    return [logits_BV[:, :VOCABULARY] for logits_BV in found], rows


def trained(model: GPTModel, row: list[int]) -> Tensor:
    """Logits ``[T, V]`` of the training forward for one row without padding."""
    with megatron_device():
        logits_BTV: Tensor = run_model(model, torch.tensor([row]), 1)
    return logits_BTV[0, :, :VOCABULARY].float()


def error(found: list[Tensor], expected_TV: Tensor, row: int) -> float:
    """Largest difference of a row's logits, relative to the largest of them."""
    expected = expected_TV[-len(found) :]
    mine = torch.stack([logits_BV[row] for logits_BV in found])
    return float((mine - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_logits_are_those_of_the_training_forward(folder: Path) -> None:
    model = load(folder)
    found, rows = decoded(Decoder(model))
    assert max(error(found, trained(model, row), i) for i, row in enumerate(rows)) < CLOSE


@torch.no_grad()
def test_unpacked_weights_give_the_same(folder: Path) -> None:
    model = load(folder)
    with torch.backends.mkldnn.flags(enabled=False):
        found, rows = decoded(Decoder(model))
    assert max(error(found, trained(model, row), i) for i, row in enumerate(rows)) < CLOSE


@pytest.mark.parametrize("kind", [tiny_llama, tiny_llama3, tiny_qwen3])
@torch.no_grad()
def test_long_sequences_equal_transformers(kind, tmp_path: Path) -> None:
    """Positions where Llama 3's scaled frequencies show, far beyond one block of attention."""
    reference: PreTrainedModel = kind(tmp_path, vocab=VOCABULARY)
    found, rows = decoded(Decoder(load(tmp_path)), lengths=(700, 333, 3))
    for i, row in enumerate(rows):
        expected_TV = reference(torch.tensor([row])).logits[0]
        # transformers rounds angles in fp32 as well, but from positions of the row, not of the batch.
        assert error(found, expected_TV, i) < 5 * CLOSE


@torch.no_grad()
def test_bf16_is_as_exact_as_the_training_forward(folder: Path) -> None:
    """Both against fp32 with the same rounded weights."""
    rounded = load(folder, "bf16")
    exact = load(folder)
    for mine, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
        mine.copy_(theirs)
    found, rows = decoded(Decoder(rounded))
    mine, theirs = 0.0, 0.0
    for i, row in enumerate(rows):
        expected_TV = trained(exact, row)
        mine = max(mine, error(found, expected_TV, i))
        steps = trained(rounded, row)[-len(found) :]
        theirs = max(theirs, error(list(steps[:, None]), expected_TV, 0))
    assert 0 < mine < 1.5 * theirs  # errors of a hundred roundings are random


def test_parameters_are_those_of_now(world: groups.Groups, tmp_path: Path) -> None:
    """Packed weights live as long as one ``generate``, and what brings parameters comes before them."""
    tiny_llama(tmp_path, vocab=VOCABULARY)
    model, changed = load(tmp_path), load(tmp_path)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))

    def bring() -> None:
        for mine, theirs in zip(model.parameters(), changed.parameters(), strict=True):
            mine.copy_(theirs)

    prompts = random_tokens(4, 6).tolist()
    before = generator(model, world).generate(prompts, GREEDY, seed=0)
    late = generator(model, world, gather=bring)
    expected = generator(changed, world).generate(prompts, GREEDY, seed=0)
    assert not torch.equal(before.tokens_BT, expected.tokens_BT)
    for _ in range(2):
        after = late.generate(prompts, GREEDY, seed=0)
        assert torch.equal(after.tokens_BT, expected.tokens_BT)
        assert torch.equal(after.logprobs_BT, expected.logprobs_BT)


@torch.no_grad()
def test_megatron_layers_give_the_same(folder: Path) -> None:
    """The way that other models take, through the same interface."""
    model = load(folder)
    expected, _ = decoded(Decoder(model))
    with inference_state([model]):
        found, _ = decoded(MegatronLayers(model))
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).abs().max() / theirs.abs().max()) < CLOSE


def test_an_unknown_layer_is_named_once_and_run_by_megatron(
    world: groups.Groups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_llama(tmp_path, vocab=VOCABULARY)
    known, model = load(tmp_path), load(tmp_path)
    make_unknown(model)
    prompts = [random_tokens(1, length)[0].tolist() for length in (5, 1, 9, 3, 9)]
    with caplog.at_level(logging.WARNING):
        expected = generator(known, world, eos_ids=[4, 5, 6]).generate(prompts, GREEDY, seed=0)
        assert not caplog.records
        other = generator(model, world, eos_ids=[4, 5, 6])
        for _ in range(2):
            found = other.generate(prompts, GREEDY, seed=0)
    (record,) = caplog.records
    assert "input_layernorm UnknownNorm" in record.getMessage()
    assert torch.equal(found.tokens_BT, expected.tokens_BT)
    assert not torch.equal(found.logprobs_BT, expected.logprobs_BT)  # other kernels


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_func", torch.nn.functional.gelu),
        ("glu_linear_offset", 1.0),
        ("layernorm_zero_centered_gamma", True),
        ("no_rope_freq", [1, 0, 1, 0]),
        ("num_moe_experts", 4),
        ("rotary_interleaved", True),
        ("softmax_type", "off-by-one"),
    ],
)
def test_a_configuration_that_computes_something_else_is_named(
    tmp_path: Path, field: str, value: object
) -> None:
    tiny_llama(tmp_path, vocab=VOCABULARY)
    model = load(tmp_path)
    assert layers.obstacle(model) is None
    setattr(model.config, field, value)
    found = layers.obstacle(model)
    assert found is not None and found.startswith(field)


def test_partial_rotation_is_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=VOCABULARY)
    model = load(tmp_path)
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq[::2]
    found = layers.obstacle(model)
    assert found is not None and "part of a head" in found
