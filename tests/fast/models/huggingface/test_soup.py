"""Merged models against torch's own averages of what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from gapo_mega.models.huggingface.soup import write_soup
from tests.helpers.hf_directories import classifier
from tests.helpers.tiny import byte_tokenizer, tiny_llama, tiny_qwen2

WEIGHTS = "model.safetensors"


def two(folder: Path, **options: Any) -> list[Path]:
    for seed, name in enumerate(("a", "b")):
        tiny_llama(folder / name, vocab=101, seed=seed, **options)
    return [folder / "a", folder / "b"]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


def assert_same_bits(found: Path, expected: Path) -> None:
    one, other = tensors_of(found), tensors_of(expected)
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert one[name].dtype == value.dtype, name
        assert torch.equal(one[name].view(torch.uint8), value.view(torch.uint8)), name


def assert_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A float64 sum in another order may fall to the other side of where float32 rounds."""
    assert bool(((found.double() - expected).abs() <= 2**-23 * expected.abs() + 1e-15).all())


def rewrite(directory: Path, changed: dict[str, torch.Tensor], without: str | None = None) -> None:
    tensors = tensors_of(directory) | changed
    tensors.pop(without or "", None)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("weights", [(0.3, 0.7), (-0.5, 1.5), (1 / 3, 2 / 3)])
def test_a_soup_is_the_average_of_what_transformers_loads(tmp_path: Path, weights: Any) -> None:
    sources = two(tmp_path)
    write_soup(sources, weights, tmp_path / "out")
    states = [AutoModelForCausalLM.from_pretrained(source).state_dict() for source in sources]
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in merged.state_dict().items():
        expected = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
        assert_rounded(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_soup_of_a_model_with_itself_is_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    source, _ = two(tmp_path)
    rewrite(source, {name: value.to(dtype) for name, value in tensors_of(source).items()})
    write_soup([source, source, source], [0.2, 0.3, 0.5], tmp_path / "out")
    assert_same_bits(tmp_path / "out", source)


def test_the_whole_weight_is_a_copy_of_one_model(tmp_path: Path) -> None:
    """Bit for bit, whatever numbers it holds, and whatever the other one holds."""
    a, b = two(tmp_path)
    name = "model.norm.weight"
    for source, odd in ((a, [float("nan"), -0.0, float("inf")]), (b, [float("inf")] * 3)):
        value = tensors_of(source)[name]
        value[:3] = torch.tensor(odd)
        rewrite(source, {name: value})
    write_soup([a, b], [1.0, 0.0], tmp_path / "first")
    write_soup([a, b], [0.0, 1.0], tmp_path / "second")
    assert_same_bits(tmp_path / "first", a)
    assert_same_bits(tmp_path / "second", b)


def test_sums_are_rounded_at_the_end(tmp_path: Path) -> None:
    """In bf16 each of three terms would be rounded."""
    sources = two(tmp_path)
    for source in sources:
        rewrite(source, {name: value.bfloat16() for name, value in tensors_of(source).items()})
    write_soup([*sources, sources[0]], [0.1, 0.3, 0.6], tmp_path / "out")
    a, b = map(tensors_of, sources)
    for name, value in tensors_of(tmp_path / "out").items():
        expected = 0.7 * a[name].double() + 0.3 * b[name].double()
        # Half of bf16's last bit; torch goes from float64 to bf16 by way of float32. The rest is float64's
        # rounding where terms cancel.
        half_bit = (2**-8 + 2**-24) * expected.abs()
        assert bool(((value.double() - expected).abs() <= half_bit + 1e-15).all()), name


def test_types_are_kept_or_asked_for(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    write_soup([a, b], [0.5, 0.5], tmp_path / "out", dtype=torch.bfloat16)
    one, other, found = map(tensors_of, (a, b, tmp_path / "out"))
    for name, value in found.items():
        assert torch.equal(value, (0.5 * one[name].double() + 0.5 * other[name].double()).bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    with pytest.raises(ValueError, match=r"^--dtype: found none, but \S+ is float32 in .*a and bfloat16 in "):
        write_soup([a, tmp_path / "out"], [0.5, 0.5], tmp_path / "mixed")
    write_soup([a, tmp_path / "out"], [0.5, 0.5], tmp_path / "mixed", dtype=torch.float32)
    for name, value in tensors_of(tmp_path / "mixed").items():
        assert_rounded(value, 0.5 * one[name].double() + 0.5 * found[name].double())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    """Also where a directory holds the output layer once more."""
    a, b = two(tmp_path, tied=True)
    rewrite(b, {"lm_head.weight": tensors_of(b)["model.embed_tokens.weight"].clone()})
    for order in ([a, b], [b, a]):
        write_soup(order, [0.5, 0.5], tmp_path / "out", overwrite=True)
        assert "lm_head.weight" not in tensors_of(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        expected = sum(tensors_of(m)["model.embed_tokens.weight"] for m in (a, b)) / 2
        assert torch.equal(model.lm_head.weight, expected)
    rewrite(b, {"lm_head.weight": 2 * tensors_of(b)["lm_head.weight"]})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        write_soup([a, b], [0.5, 0.5], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_score_models_can_be_merged(tmp_path: Path) -> None:
    a, b = classifier(tmp_path / "a"), classifier(tmp_path / "b")
    write_soup([a, b], [0.4, 0.6], tmp_path / "out")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    expected = 0.4 * tensors_of(a)["score.weight"].double() + 0.6 * tensors_of(b)["score.weight"].double()
    assert_rounded(model.score.weight, expected)


def test_sharded_and_single_files_mix(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    AutoModelForCausalLM.from_pretrained(b).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    write_soup([a, b], [0.3, 0.7], tmp_path / "one")
    write_soup([tmp_path / "shards", a], [0.7, 0.3], tmp_path / "other")
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_rounded(other[name], value.double())


def test_models_that_differ_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    a, b = two(tmp_path / "models")
    tiny_qwen2(tmp_path / "qwen", vocab=101)
    tiny_llama(tmp_path / "heads", vocab=101, heads=2)
    tiny_llama(tmp_path / "rope", vocab=101, rope_theta=50000.0)
    for other, message in (
        ("qwen", r"^--model: .*qwen/config\.json has "),
        ("heads", r"heads/config\.json has num_attention_heads 2, accepted: 4, as in .*a$"),
        ("rope", r"rope/config\.json has rope_\w+ .*50000.*accepted: .*10000"),
    ):
        with pytest.raises(ValueError, match=message):
            write_soup([a, tmp_path / other], [0.5, 0.5], tmp_path / "out" / "soup")
    name = "model.layers.1.mlp.up_proj.weight"
    value = tensors_of(b)[name]
    for change, message in (
        (
            {name: value[:-1].clone()},
            rf"^--model: {name} of .*b has the shape \[95, 72\], accep",
        ),
        ({name: value.to(torch.int8)}, rf"{name} is stored as int8, accepted: float64"),
        (
            {name: value, "model.extra": value.clone()},
            r"b: tensors that this model does not have: model\.extra",
        ),
    ):
        rewrite(b, change)
        with pytest.raises(ValueError, match=message):
            write_soup([a, b], [0.5, 0.5], tmp_path / "out" / "soup")
    rewrite(b, {}, without="model.extra")
    rewrite(b, {}, without=name)
    with pytest.raises(ValueError, match=rf"b: tensors missing: {name}"):
        write_soup([a, b], [0.5, 0.5], tmp_path / "out" / "soup")
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    byte_tokenizer(a)
    write_soup([b, a], [0.5, 0.5], tmp_path / "one-has-none")
    byte_tokenizer(b)
    write_soup([a, b], [0.5, 0.5], tmp_path / "alike")
    whole = json.loads((b / "tokenizer.json").read_text())
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
    (one, i), (other, j) = list(vocabulary.items())[10:12]
    swapped = vocabulary | {one: j, other: i}
    for model, message in (
        ({"vocab": swapped}, r"^--model: the tokenizer of .*b has other tokens \(such as "),
        ({"merges": merges[1:]}, r"^--model: the tokenizer of .*b has other rules of splitting texts than"),
    ):
        (b / "tokenizer.json").write_text(json.dumps(whole | {"model": whole["model"] | model}))
        with pytest.raises(ValueError, match=message):
            write_soup([a, b], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_beyond_its_type_leaves_nothing_behind(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    for source, size in ((a, 60000.0), (b, -60000.0)):
        tensors = {name: value.half() for name, value in tensors_of(source).items()}
        tensors["model.norm.weight"][5] = size
        rewrite(source, tensors)
    with pytest.raises(ValueError, match=r"^--weights: the sum of model\.norm\.weight: found .*at most 6"):
        write_soup([a, b], [2.0, -1.0], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
