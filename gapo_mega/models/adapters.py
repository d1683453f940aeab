"""Low-rank adapters of a model's linear layers: where they lie in Megatron's layers, and in PEFT's files.

Megatron has one linear layer for queries, keys and values and one for gate and up; Hugging Face has one for
each, and so has PEFT adapters. Here every Hugging Face layer keeps an A ``[rank, in]`` and a B
``[out, rank]`` of its own, and ``joined`` puts their outputs into Megatron's order. Pure tensor code.

A tensor-parallel rank holds the rows of B that make its outputs where Megatron splits the outputs (queries,
keys, values, gate, up), and the columns of A that take its inputs where Megatron splits the inputs (o, down).
The other of the two is whole on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.config.lora import TARGET_MODULES, LoraConfig
from gapo_mega.models.shape import ModelShape

A, B = "lora_A", "lora_B"
ADAPTERS = "adapters"  # the child of a transformer layer that holds its adapters
_NAME = re.compile(rf"^decoder\.layers\.(\d+)\.{ADAPTERS}\.(\w+)\.({A}|{B})$")


@dataclass(frozen=True)
class Linear:
    """A linear layer of Megatron's, and the Hugging Face layers that it is made of.

    Attributes:
        path: within a transformer layer.
        modules: Hugging Face names, in the order of Megatron's outputs.
        folder: of these modules in a Hugging Face layer.
        splits_inputs: whether tensor parallelism splits the inputs; else it splits the outputs.
        by_group: whether the outputs of the modules alternate by key/value group.
    """

    path: str
    modules: tuple[str, ...]
    folder: str
    splits_inputs: bool = False
    by_group: bool = False


LINEARS = (
    Linear("self_attention.linear_qkv", ("q_proj", "k_proj", "v_proj"), "self_attn", by_group=True),
    Linear("self_attention.linear_proj", ("o_proj",), "self_attn", splits_inputs=True),
    Linear("mlp.linear_fc1", ("gate_proj", "up_proj"), "mlp"),
    Linear("mlp.linear_fc2", ("down_proj",), "mlp", splits_inputs=True),
)
_LINEAR_OF = {module: linear for linear in LINEARS for module in linear.modules}
assert tuple(_LINEAR_OF) == TARGET_MODULES


def linear_of(module: str) -> Linear:
    """Megatron's layer that a Hugging Face layer is a part of."""
    return _LINEAR_OF[module]


def sizes(shape: ModelShape, module: str) -> tuple[int, int]:
    """Inputs and outputs of a Hugging Face layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
    return {
        "q_proj": (shape.hidden, queries),
        "k_proj": (shape.hidden, keys),
        "v_proj": (shape.hidden, keys),
        "o_proj": (queries, shape.hidden),
        "gate_proj": (shape.hidden, shape.ffn),
        "up_proj": (shape.hidden, shape.ffn),
        "down_proj": (shape.ffn, shape.hidden),
    }[module]


def local_sizes(shape: ModelShape, module: str, tensor: int) -> tuple[int, int]:
    """Inputs of A and outputs of B on one of ``tensor`` tensor-parallel ranks."""
    inputs, outputs = sizes(shape, module)
    return (inputs // tensor, outputs) if linear_of(module).splits_inputs else (inputs, outputs // tensor)


def layer_parameters(shape: ModelShape, lora: LoraConfig, tensor: int = 1) -> int:
    """Parameters of one layer's adapters on a tensor-parallel rank."""
    return sum(lora.rank * sum(local_sizes(shape, module, tensor)) for module in lora.targets)


def joined(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Outputs ``[..., O_k]`` of the parts of one linear layer in Megatron's order, ``[..., sum O_k]``.

    ``groups``: key/value groups by which they alternate; 1: one part after the other.
    """
    if len(parts) == 1:
        return parts[0]
    grouped = [part.reshape(*part.shape[:-1], groups, -1) for part in parts]
    return torch.cat(grouped, dim=-1).flatten(-2)


def change(parts: Sequence[tuple[Tensor, Tensor] | int], scale: float, groups: int) -> Tensor:
    """The change ``scale B A`` of a linear layer's weight ``[O, I]`` in Megatron's order, in float32.

    ``parts``: A ``[rank, I]`` and B ``[O_k, rank]`` of every part, or O_k for a part without an adapter.
    """
    inputs, like = next((part[0].shape[1], part[0]) for part in parts if not isinstance(part, int))
    changes_IO = [
        like.new_zeros(inputs, part, dtype=torch.float32)
        if isinstance(part, int)
        else (part[1].float() @ part[0].float() * scale).t()
        for part in parts
    ]
    return joined(changes_IO, groups).t()


class AdapterNames:
    """The adapters' parameters by their names in a whole Megatron model, and in PEFT's files.

    Has what ``WeightMap`` has for an export.
    """

    def __init__(self, shape: ModelShape, lora: LoraConfig, tensor: int = 1) -> None:
        self._shape, self._lora, self.tensor = shape, lora, tensor

    def names(self) -> list[str]:
        """Of all parameters, layer by layer."""
        return [
            f"decoder.layers.{layer}.{ADAPTERS}.{module}.{factor}"
            for layer in range(self._shape.num_layers)
            for module in self._lora.targets
            for factor in (A, B)
        ]

    def has(self, name: str) -> bool:
        """Whether it is an adapter's parameter."""
        return _NAME.match(name) is not None

    def parts(self, name: str) -> int:
        """Tensor-parallel ranks that share the parameter, or hold copies of it."""
        return self.tensor

    def is_copy(self, name: str) -> bool:
        """Never: no parameter of an adapter is on two stages."""
        return False

    def source(self, name: str) -> str:
        """Its name in PEFT's files."""
        layer, module, factor = self._parts(name)
        folder = linear_of(module).folder
        return f"base_model.model.model.layers.{layer}.{folder}.{module}.{factor}.weight"

    def size(self, name: str) -> tuple[int, int]:
        """The shape of the whole parameter."""
        _, module, factor = self._parts(name)
        inputs, outputs = sizes(self._shape, module)
        return (self._lora.rank, inputs) if factor == A else (outputs, self._lora.rank)

    def to_hf(self, name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """The whole parameter from all tensor-parallel ranks' parts, by its name in PEFT's files."""
        axis = self._split_axis(name)
        return {self.source(name): parts[0] if axis is None else torch.cat(list(parts), dim=axis)}

    def part_of(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """Tensor-parallel rank ``rank``'s part of a whole parameter."""
        axis = self._split_axis(name)
        return whole if axis is None else whole.chunk(self.tensor, dim=axis)[rank]

    def _split_axis(self, name: str) -> int | None:
        _, module, factor = self._parts(name)
        return split_axis(module, factor)

    @staticmethod
    def _parts(name: str) -> tuple[int, str, str]:
        found = _NAME.match(name)
        assert found is not None, name
        return int(found.group(1)), found.group(2), found.group(3)


def split_axis(module: str, factor: str) -> int | None:
    """The axis of A or B that tensor parallelism splits; None: every rank holds all of it."""
    if linear_of(module).splits_inputs:
        return 1 if factor == A else None
    return 0 if factor == B else None


def merged(
    name: str, weight: Tensor, shape: ModelShape, lora: LoraConfig, read: Callable[[str], Tensor]
) -> Tensor:
    """A whole model's parameter ``name`` with its adapters' change, in its dtype; as it is without any.

    ``read`` gives an adapter's whole parameter by its name in the Megatron model.
    """
    for linear in LINEARS:
        place = re.match(rf"^decoder\.layers\.(\d+)\.{re.escape(linear.path)}\.weight$", name)
        if place is None or not set(linear.modules) & set(lora.targets):
            continue
        before = f"decoder.layers.{place.group(1)}.{ADAPTERS}"
        parts: list[tuple[Tensor, Tensor] | int] = [
            (read(f"{before}.{module}.{A}"), read(f"{before}.{module}.{B}"))
            if module in lora.targets
            else sizes(shape, module)[1]
            for module in linear.modules
        ]
        changed = change(parts, lora.scale, shape.kv_groups if linear.by_group else 1)
        return (weight.float() + changed).to(weight.dtype)
    return weight


def settings_of(lora: LoraConfig) -> dict[str, object]:
    """What a checkpoint says of its adapters; ``LoraConfig`` takes it."""
    return lora.model_dump(exclude={"path"})


def from_settings(stored: Mapping[str, object] | None) -> LoraConfig | None:
    """The adapters that a checkpoint says it has; None: none."""
    return None if stored is None else LoraConfig.model_validate(dict(stored))
