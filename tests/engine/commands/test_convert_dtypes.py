"""Stored types through a conversion: every tensor keeps its own, and no number becomes infinite."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import convert, weights
from gapo_mega.engine.megatron.checkpoint.dist_format import DistReader
from gapo_mega.engine.megatron.model import build
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from tests.helpers.hf_directories import assert_same_model, files_of, language_model
from tests.helpers.tiny import safe_rlhf_model, tiny_mistral, tiny_qwen2, tiny_qwen3

WIDE, HALF, BRAIN, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64


def rewrite(directory: Path, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = {
        name: change(name, value) for name, value in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def first_layer_is(other: torch.dtype, rest: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    return lambda name, value: value.to(other if ".layers.0." in name else rest)


def in_turn(name: str, value: Tensor) -> Tensor:
    """Another type for neighbours of one parameter: gate and up, Q, K and V, and layers."""
    kinds = (WIDE, HALF, BRAIN, DOUBLE)
    return value.to(kinds[sum(map(ord, name)) % 4])


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}])
@pytest.mark.parametrize(
    "change",
    [
        first_layer_is(BRAIN, WIDE),
        first_layer_is(WIDE, BRAIN),
        first_layer_is(HALF, BRAIN),
        first_layer_is(HALF, DOUBLE),
        in_turn,
        lambda _, value: value.double(),
    ],
)
def test_every_tensor_comes_back_in_its_own_type(
    change: Callable[[str, Tensor], Tensor], layout: dict[str, int], tmp_path: Path
) -> None:
    source = language_model(tmp_path / "hf")
    rewrite(source, change)
    before = files_of(source)
    convert.to_checkpoint(source, tmp_path / "ckpt", **layout)
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    one, other = load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name
    if {value.dtype for value in other.values()} != {DOUBLE}:  # else config.json says so
        assert files_of(tmp_path / "back") == before


@pytest.mark.parametrize("make", [tiny_mistral, tiny_qwen2, tiny_qwen3, safe_rlhf_model])
def test_every_family_keeps_mixed_types(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda name, value: in_turn(name, value) if value.numel() > 1 else value)
    convert.to_checkpoint(tmp_path / "hf", tmp_path / "ckpt", tensor=2)
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_model(tmp_path / "back", tmp_path / "hf")


def test_what_only_half_precision_or_only_bf16_holds_survives_the_mix(tmp_path: Path) -> None:
    """70000 is infinite in fp16, 2^-24 + 2^-17 loses its tail in bf16: fp32 holds both."""
    source = language_model(tmp_path / "hf")
    first, second = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1))

    def change(name: str, value: Tensor) -> Tensor:
        value = value.to(HALF if ".layers.0." in name else BRAIN)
        value.view(-1)[0] = {first: 2**-24 + 2**-17, second: 70144.0}.get(name, 1.0)
        return value

    rewrite(source, change)
    convert.to_checkpoint(source, tmp_path / "ckpt")
    stored = DistReader(tmp_path / "ckpt")
    key = "decoder.layers.self_attention.linear_proj.weight"
    assert stored.tensors[key].properties.dtype == WIDE
    assert stored.read(key)[:2, 0, 0].tolist() == [2**-24 + 2**-17, 70144.0]


@pytest.mark.parametrize("wished", [BRAIN, HALF, WIDE])
def test_a_type_that_is_asked_for_holds_for_all(wished: torch.dtype, tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    original = rewrite(source, in_turn)
    convert.to_checkpoint(source, tmp_path / "ckpt", dtype=wished)
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], value.to(wished)) for name, value in original.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(wished).split(".")[1]
    convert.to_checkpoint(source, tmp_path / "mixed")
    convert.to_hf(tmp_path / "mixed", tmp_path / "other", dtype=wished)
    assert_same_model(tmp_path / "other", tmp_path / "back")


UP = "model.layers.2.mlp.up_proj.weight"


def with_value(directory: Path, number: float, dtype: torch.dtype = WIDE, name: str = UP) -> Path:
    source = language_model(directory)

    def change(found: str, value: Tensor) -> Tensor:
        if found == name:
            value = value.to(dtype)
            value[3, 5] = number
        return value

    rewrite(source, change)
    return source


@pytest.mark.parametrize(
    ("number", "dtype", "wished"), [(7e4, WIDE, HALF), (3.4e38, WIDE, BRAIN), (-1e39, DOUBLE, WIDE)]
)
def test_a_type_that_is_too_small_is_refused_by_name(
    number: float, dtype: torch.dtype, wished: torch.dtype, tmp_path: Path
) -> None:
    source = with_value(tmp_path / "hf", number, dtype)
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight: found a number of size"):
        convert.to_checkpoint(source, tmp_path / "ckpt", dtype=wished)
    convert.to_checkpoint(source, tmp_path / "ckpt")
    with pytest.raises(ValueError, match=rf"{UP}: found a number of size .*, accepted: at most"):
        convert.to_hf(tmp_path / "ckpt", tmp_path / "back", dtype=wished)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


def test_nan_passes_a_conversion_bit_by_bit_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = with_value(tmp_path / "hf", float("nan"))
    with caplog.at_level(logging.WARNING):
        convert.to_checkpoint(source, tmp_path / "ckpt")
    assert [message for message in caplog.messages if UP in message and "NaN" in message]
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    one, other = (load_file(path / "model.safetensors")[UP] for path in (tmp_path / "back", source))
    assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_are_refused_by_name(stored: torch.dtype, tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    rewrite(source, lambda name, value: value.to(stored) if name == UP else value)
    with pytest.raises(ValueError, match=rf"{UP} is stored as .*, accepted: float64, float32, float16, bfl"):
        convert.to_checkpoint(source, tmp_path / "ckpt")
    rewrite(source, lambda name, value: value.float())
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, f"{UP}_scale": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=rf"does not have: {UP}_scale"):
        convert.to_checkpoint(source, tmp_path / "ckpt")


@pytest.mark.parametrize("form", ["hf", "ckpt"])
@pytest.mark.parametrize(
    ("number", "stored", "dtype", "message"),
    [
        (float("nan"), WIDE, "fp32", "holds NaN or infinite numbers"),
        (float("-inf"), HALF, "bf16", "holds NaN or infinite numbers"),
        (3.4e38, WIDE, "bf16", r"model\.dtype"),
        (1e39, DOUBLE, "fp32", r"model\.dtype"),
        (3.4e38, WIDE, "fp32", None),
    ],
)
def test_a_model_is_loaded_with_finite_weights_or_not_at_all(
    form: str,
    number: float,
    stored: torch.dtype,
    dtype: Any,
    message: str | None,
    tmp_path: Path,
    one_process: None,
) -> None:
    source = with_value(tmp_path / "hf", number, stored)
    convert.to_checkpoint(source, tmp_path / "ckpt")
    shape = shape_of(HFDirectory(source).config)
    with megatron_device():
        config = ModelConfig(path=str(source), dtype=dtype)
        model = build.build_gpt(shape, config, ParallelConfig())
        if dtype == "bf16":
            model.bfloat16()
        if message is None:
            weights.load(model, shape, tmp_path / form)
            return
        with pytest.raises(ValueError, match=message) as caught:
            weights.load(model, shape, tmp_path / form)
    assert UP in str(caught.value) or "mlp.linear_fc1.weight" in str(caught.value)


def test_layers_that_config_json_does_not_count_are_not_left_out_in_silence(
    tmp_path: Path, one_process: None
) -> None:
    """Fewer layers may be asked for, but the file's own must be those that config.json counts."""
    source = language_model(tmp_path / "hf")
    extra = "model.layers.4.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, extra: torch.zeros(96, 72)}, source / "model.safetensors")
    shape = shape_of(HFDirectory(source).config)
    with megatron_device():
        for layers in (2, 4):
            some = dataclasses.replace(shape, num_layers=layers)
            model = build.build_gpt(some, ModelConfig(path=str(source)), ParallelConfig())
            with pytest.raises(ValueError, match=rf"does not have: {extra}"):
                weights.load(model, some, source)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mixed_types_load_alike_from_both_forms(dtype: Any, tmp_path: Path, one_process: None) -> None:
    """Every parameter is the source's numbers in the model's type, rounded once."""
    source = language_model(tmp_path / "hf")
    tensors = rewrite(source, in_turn)
    convert.to_checkpoint(source, tmp_path / "ckpt", tensor=2)
    shape = shape_of(HFDirectory(source).config)
    found = []
    for form in ("hf", "ckpt"):
        with megatron_device():
            model = build.build_gpt(shape, ModelConfig(path=str(source), dtype=dtype), ParallelConfig())
            if dtype == "bf16":
                model.bfloat16()
            weights.load(model, shape, tmp_path / form)
        found.append(dict(model.named_parameters()))
    kind = {"fp32": WIDE, "bf16": BRAIN}[dtype]
    for layer in range(4):
        names = [f"model.layers.{layer}.mlp.{half}_proj.weight" for half in ("gate", "up")]
        expected = torch.cat([tensors[name].double() for name in names]).to(kind)
        for parameters in found:
            assert torch.equal(parameters[f"decoder.layers.{layer}.mlp.linear_fc1.weight"], expected)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
