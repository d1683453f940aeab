"""GGUF files of tiny models of every family: the same weights and logits as before they were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf import TokenType
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gapo_mega.models import shape_of
from gapo_mega.models.gguf.importing import import_gguf
from tests.helpers.gguf_files import Metadata, metadata_of, tensors_of, write_gguf
from tests.helpers.tiny import LLAMA3_ROPE, tiny_llama, tiny_llama3, tiny_mistral, tiny_qwen2, tiny_qwen3

# Relative to the greatest logit, in fp32, as everywhere where transformers is compared with.
TOLERANCE = 2e-5
# Long enough for the scaled frequencies of Llama 3.1 to show.
TOKENS_BT = torch.randint(3, 250, (1, 300), generator=torch.Generator().manual_seed(1))
VOCAB = 264  # two more than there are tokens: embeddings are often padded


def llama(directory: Path) -> PreTrainedModel:
    return tiny_llama(directory, vocab=VOCAB)


def tied_llama(directory: Path) -> PreTrainedModel:
    return tiny_llama(directory, vocab=VOCAB, tied=True)


def llama3(directory: Path) -> PreTrainedModel:
    return tiny_llama3(directory, vocab=VOCAB)


def llama32(directory: Path) -> PreTrainedModel:
    rope = {**LLAMA3_ROPE, "factor": 32.0}
    return tiny_llama(
        directory, vocab=VOCAB, rope_parameters=rope, max_position_embeddings=131072, tied=True, head_dim=64
    )


def mistral(directory: Path) -> PreTrainedModel:
    return tiny_mistral(directory, vocab=VOCAB)


def qwen2(directory: Path) -> PreTrainedModel:
    return tiny_qwen2(directory, vocab=VOCAB)


def qwen3(directory: Path) -> PreTrainedModel:
    return tiny_qwen3(directory, vocab=VOCAB)


FAMILIES = [llama, tied_llama, llama3, llama32, mistral, qwen2, qwen3]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS_BT).logits
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def imported(folder: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> PreTrainedModel:
    import_gguf(write_gguf(folder / "model.gguf", metadata, tensors), folder / "out")
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "out")
    return loaded.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_logits_come_back(tmp_path: Path, family: Callable[[Path], PreTrainedModel]) -> None:
    original = family(tmp_path / "hf")
    found = imported(tmp_path, metadata_of(original), tensors_of(original))
    assert found.dtype == torch.float32
    assert found.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert relative_error(logits(found), logits(original)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_is_told_the_same(tmp_path: Path, family: Callable[[Path], PreTrainedModel]) -> None:
    original = family(tmp_path / "hf")
    imported(tmp_path, metadata_of(original), tensors_of(original))
    found, expected = shape_of(AutoConfig.from_pretrained(tmp_path / "out")), shape_of(original.config)
    assert vars(found) | {"family": ""} == vars(expected) | {"family": ""}


@pytest.mark.parametrize("family", [llama, mistral])
def test_the_order_of_rows_shows(tmp_path: Path, family: Callable[[Path], PreTrainedModel]) -> None:
    original = family(tmp_path / "hf")
    found = imported(tmp_path, metadata_of(original), tensors_of(original, rotary_order=False))
    assert relative_error(logits(found), logits(original)) > 0.01


@pytest.mark.parametrize("family", [llama3, llama32])
def test_scaled_frequencies_show(tmp_path: Path, family: Callable[[Path], PreTrainedModel]) -> None:
    """Without the divisors the file is a whole one of an unscaled model, and computes something else."""
    original = family(tmp_path / "hf")
    tensors = tensors_of(original)
    del tensors["rope_freqs.weight"]
    found = imported(tmp_path, metadata_of(original), tensors)
    assert found.config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert relative_error(logits(found), logits(original)) > 100 * TOLERANCE


def test_divisors_of_one_scale_nothing(tmp_path: Path) -> None:
    original = llama(tmp_path / "hf")
    found = imported(
        tmp_path, metadata_of(original), tensors_of(original) | {"rope_freqs.weight": torch.ones(8)}
    )
    assert found.config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("change", [{"low_freq_factor": 1.1}, {"original_max_position_embeddings": 4096}])
def test_other_scalings_are_refused(tmp_path: Path, change: dict[str, float]) -> None:
    rope = LLAMA3_ROPE | change
    original = tiny_llama(tmp_path / "hf", vocab=VOCAB, rope_parameters=rope, head_dim=64)
    with pytest.raises(
        ValueError, match=r"rope_freqs.weight is '32 numbers from 1 to 8', accepted: Llama 3's"
    ):
        imported(tmp_path, metadata_of(original), tensors_of(original))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16], ids=lambda kind: kind.name
)
def test_half_precision_comes_back(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    original = qwen3(tmp_path / "hf")
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
    path = write_gguf(tmp_path / "model.gguf", metadata_of(original), tensors_of(original), kind)
    import_gguf(path, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in original.state_dict().items():
        expected = tensor.to(dtype).float() if tensor.ndim > 1 else tensor
        assert torch.equal(found[name], expected), name


def test_quantised_blocks_come_back(tmp_path: Path) -> None:
    """Q8_0: 32 numbers of a row share a step, the greatest of them over 127, kept in fp16."""
    original = mistral(tmp_path / "hf")
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "model.gguf", metadata_of(original), tensors_of(original), kind)
    import_gguf(path, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in original.state_dict().items():
        if tensor.ndim > 1:
            blocks, expected = found[name].unflatten(1, (-1, 32)), tensor.unflatten(1, (-1, 32))
            step = expected.abs().amax(-1, keepdim=True) / 127
            # Half a step of rounding; fp16 moves the step by 2^-11, which counts 127 times at most.
            assert torch.all((blocks - expected).abs() <= step * (0.5 + 127 * 2**-11)), name


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    original = tiny_llama(tmp_path / "hf", vocab=VOCAB, groups=4)
    absent = ["rope.freq_base", "vocab_size", "attention.head_count_kv", "attention.key_length"]
    absent += ["attention.value_length"]  # the width of a head is told by rope.dimension_count then
    changes: Metadata = {f"llama.{key}": None for key in absent} | {"general.type": None}
    found = imported(tmp_path, metadata_of(original) | changes, tensors_of(original))
    assert relative_error(logits(found), logits(original)) <= TOLERANCE
    assert (found.config.head_dim, found.config.vocab_size) == (16, VOCAB)
    assert (found.config.bos_token_id, found.config.eos_token_id, found.config.pad_token_id) == (1, 2, None)


def test_qwen_has_no_first_token(tmp_path: Path) -> None:
    original = qwen2(tmp_path / "hf")
    found = imported(tmp_path, metadata_of(original), tensors_of(original))
    for settings in (found.config, found.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (None, 257, None)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (llama, {"split.count": 2}, r"split\.count is 2, accepted: \[None, 0, 1\]"),
        (llama, {"general.type": "adapter"}, r"general\.type is 'adapter', accepted: \[None, 'model'\]"),
        (llama, {"llama.rope.scaling.type": "yarn"}, r"scaling\.type is 'yarn', accepted: \[None, 'none'\]"),
        (
            qwen2,
            {"qwen2.rope.scaling.factor": 4.0},
            r"scaling\.factor is 4\.0, accepted: \[None, 0\.0, 1\.0\]",
        ),
        (llama, {"llama.expert_count": 8}, r"llama\.expert_count is 8, accepted: \[None, 0\]"),
        (mistral, {"llama.attention.sliding_window": 4096}, r"sliding_window is 4096, accepted: \[None, 0\]"),
        (qwen3, {"qwen3.pooling_type": 3}, r"pooling_type is 3, accepted: \[None, 0\]"),
        (llama, {"llama.attention.causal": False}, r"causal is False, accepted: \[None, True\]"),
        (
            llama,
            {"llama.logit_scale": 8.0},
            r"llama\.logit_scale is 8\.0, accepted: a model without this key",
        ),
        (qwen3, {"qwen3.attention.value_length": 8}, r"value_length is 8, accepted: \[None, 16\]"),
        (llama, {"llama.rope.dimension_count": 8}, r"rope\.dimension_count is 8, accepted: \[None, 16\]"),
        (llama, {"llama.vocab_size": 300}, r"llama\.vocab_size is 300, accepted: \[None, 264\]"),
        (llama, {"llama.block_count": None}, r"llama\.block_count is None, accepted: an integer"),
        (llama, {"llama.attention.head_count": [4, 4]}, r"head_count is \[4, 4\], accepted: an integer"),
        (llama, {"tokenizer.ggml.eos_token_id": 9999}, r"eos_token_id is 9999, accepted: 0 to 263"),
        (
            llama,
            {"llama.feed_forward_length": 100},
            r"has shape \[96, 72\], its metadata promises \[100, 72\]",
        ),
        (llama, {"llama.block_count": 5}, r"no tensor blk\.4\.attn_q\.weight for model\.layers\.4"),
        (llama, {"llama.block_count": 3}, r"does not have: \['blk\.3\.attn_k\.weight'"),
    ],
)
def test_other_models_are_refused(
    tmp_path: Path, family: Callable[[Path], PreTrainedModel], changes: Metadata, message: str
) -> None:
    original = family(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        imported(tmp_path, metadata_of(original) | changes, tensors_of(original))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.gguf"]


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        (llama, "blk.0.attn_q.bias"),
        (llama, "blk.0.attn_output.bias"),
        (llama, "blk.0.ffn_gate_inp.weight"),
        (qwen2, "rope_freqs.weight"),
        (qwen3, "blk.0.attn_q.bias"),
    ],
)
def test_tensors_too_many_are_refused(
    tmp_path: Path, family: Callable[[Path], PreTrainedModel], extra: str
) -> None:
    original = family(tmp_path / "hf")
    with pytest.raises(ValueError, match=rf"model does not have: \['{extra}'\]; accepted: those of"):
        imported(tmp_path, metadata_of(original), tensors_of(original) | {extra: torch.ones(64)})
    assert not (tmp_path / "out").exists()


def test_missing_biases_are_refused(tmp_path: Path) -> None:
    original = qwen2(tmp_path / "hf")
    tensors = tensors_of(original)
    del tensors["blk.2.attn_k.bias"]
    with pytest.raises(ValueError, match=r"no tensor blk\.2\.attn_k\.bias for model\.layers\.2\.self_attn"):
        imported(tmp_path, metadata_of(original), tensors)


def test_unknown_quantisations_are_refused(tmp_path: Path) -> None:
    original = mistral(tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", metadata_of(original), tensors_of(original))
    kind = gguf.GGMLQuantizationType.I32  # four bytes a number, as those that it takes the place of
    reader = gguf.GGUFReader(path, "r+")
    (field,) = (t.field for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    field.parts[4][0] = int(kind)
    reader.data.flush()
    with pytest.raises(
        ValueError, match=r"blk\.1\.ffn_up\.weight is quantised as I32, accepted: what the gguf"
    ):
        import_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_that_ends_a_response_in_llama_cpp_ends_one(tmp_path: Path) -> None:
    original = llama(tmp_path / "hf")
    ends: dict[str, object] = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    imported(tmp_path, metadata_of(original) | ends, tensors_of(original))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [2, 7] and model.config.eos_token_id == 2
    with pytest.raises(ValueError, match=r"eot_token_id is 9999, accepted: 0 to 263"):
        imported(
            tmp_path, metadata_of(original) | {"tokenizer.ggml.eot_token_id": 9999}, tensors_of(original)
        )


def test_types_of_tokens_are_read(tmp_path: Path) -> None:
    original = llama(tmp_path / "hf")
    metadata = metadata_of(original)
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, list) and types[1] == TokenType.CONTROL
    with pytest.raises(ValueError, match=r"token_type is 'a list of 261', accepted: 262, one a token"):
        imported(tmp_path, metadata | {"tokenizer.ggml.token_type": types[1:]}, tensors_of(original))
