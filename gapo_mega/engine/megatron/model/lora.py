"""Low-rank adapters on Megatron's own linear layers; everything else of the model is frozen.

The adapters are children of the transformer layers, beside the linear layers, whose parameters and names
stay as they are. A forward hook adds what they compute to the output of a linear layer.

Where tensor parallelism splits the outputs of a layer, A is whole on every rank and B is split. Where it
splits the inputs, A is split and B is whole. The only communications lie between A and B, of ``rank`` numbers
a token: those that Megatron's linear layer has before or behind it. With sequence parallelism the whole one
of A and B sees a part of the sequence, and carries the mark by which Megatron sums its gradient over tensor
ranks, as for norms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from gapo_mega.config.lora import LoraConfig
from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.models import adapters
from gapo_mega.models.shape import ModelShape


class LowRank(nn.Module):
    """``x [S, B, I] -> scale B A x [S, B, O]`` for one Hugging Face layer, laid out as Megatron does."""

    def __init__(self, config: TransformerConfig, shape: ModelShape, lora: LoraConfig, module: str) -> None:
        super().__init__()
        self.splits_inputs = adapters.linear_of(module).splits_inputs
        # Generation switches it off on the modules that have it.
        self.sequence_parallel = bool(config.sequence_parallel)
        self.scale = lora.scale
        self._split = {
            factor: axis
            for factor in (adapters.A, adapters.B)
            if (axis := adapters.split_axis(module, factor)) is not None
        }
        inputs, outputs = adapters.local_sizes(shape, module, config.tensor_model_parallel_size)
        self.lora_A = self._parameter(config, adapters.A, lora.rank, inputs)
        self.lora_B = self._parameter(config, adapters.B, outputs, lora.rank)

    def _parameter(self, config: TransformerConfig, factor: str, rows: int, columns: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(rows, columns, dtype=config.params_dtype, device=device()))
        if factor in self._split:
            set_tensor_model_parallel_attributes(parameter, True, self._split[factor], 1)
        else:
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def forward(self, x_SBI: Tensor) -> Tensor:
        inner_SBR = self.product(x_SBI, self.lora_A)
        return self.product(self._between(inner_SBR) * self.scale, self.lora_B)

    def product(self, x: Tensor, weight: nn.Parameter) -> Tensor:
        """``x W^T``; what takes its gradient from autograd replaces this method of an instance."""
        return nn.functional.linear(x, weight)

    def _between(self, inner_SBR: Tensor) -> Tensor:
        result: Tensor
        if self.splits_inputs and self.sequence_parallel:
            result = reduce_scatter_to_sequence_parallel_region(inner_SBR)
        elif self.splits_inputs:
            result = reduce_from_tensor_model_parallel_region(inner_SBR)
        elif self.sequence_parallel:
            result = gather_from_sequence_parallel_region(inner_SBR)
        else:
            result = copy_to_tensor_model_parallel_region(inner_SBR)
        return result

    def part(self, x: Tensor) -> Tensor:
        """``[..., I] -> [..., O]`` without communication; a sum over tensor ranks where inputs are split."""
        inner = nn.functional.linear(x, self.lora_A) * self.scale
        return nn.functional.linear(inner, self.lora_B)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Megatron's: says how A and B are split."""
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, self._split, sharded_offsets
        )
        return sharded


@dataclass
class Adapted:
    """One of Megatron's linear layers with its adapters.

    Attributes:
        parts: an adapter, or the local outputs of a part without one, in the order of Megatron's outputs.
        groups: key/value groups of this rank by which the parts' outputs alternate.
        enabled: whether the layer's output has the adapters' part.
    """

    linear: nn.Module
    parts: list[LowRank | int]
    groups: int
    enabled: bool = True

    def __post_init__(self) -> None:
        self._hook = self.linear.register_forward_hook(self._add)

    def _add(
        self, _: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None] | None:
        if not self.enabled:
            return None
        result, bias = output
        return result + self._joined([p if isinstance(p, int) else p(inputs[0]) for p in self.parts]), bias

    def part(self, x: Tensor) -> Tensor:
        """``LowRank.part`` of all adapters, in Megatron's order."""
        return self._joined([p if isinstance(p, int) else p.part(x) for p in self.parts])

    def _joined(self, outputs: Sequence[Tensor | int]) -> Tensor:
        like = next(output for output in outputs if not isinstance(output, int))
        filled = [
            like.new_zeros(*like.shape[:-1], output) if isinstance(output, int) else output
            for output in outputs
        ]
        return adapters.joined(filled, self.groups)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapters' change into the weight, and end the adapters' part in the output."""
        self.linear.get_parameter("weight").copy_(self.merged())
        self._hook.remove()

    @torch.no_grad()
    def merged(self) -> Tensor:
        """This rank's weight with the adapters' change, in its dtype."""
        weight = self.linear.get_parameter("weight")
        pairs = [p if isinstance(p, int) else (p.lora_A, p.lora_B) for p in self.parts]
        scale = next(p.scale for p in self.parts if not isinstance(p, int))
        return (weight.float() + adapters.change(pairs, scale, self.groups)).to(weight.dtype)


class LayerAdapters(MegatronModule):  # type: ignore[misc]
    """The adapters of one transformer layer, by Hugging Face names."""

    def __init__(
        self, layer: nn.Module, config: TransformerConfig, shape: ModelShape, lora: LoraConfig
    ) -> None:
        super().__init__(config)
        for module in lora.targets:
            self.add_module(module, LowRank(config, shape, lora, module))
        own = dict(self.named_children())
        self.adapted: dict[str, Adapted] = {}
        for linear in adapters.LINEARS:
            if not own.keys() & set(linear.modules):
                continue
            parts: list[Any] = [own.get(module, self._outputs(shape, module)) for module in linear.modules]
            groups = shape.kv_groups // config.tensor_model_parallel_size if linear.by_group else 1
            self.adapted[linear.path] = Adapted(layer.get_submodule(linear.path), parts, groups)

    def _outputs(self, shape: ModelShape, module: str) -> int:
        return adapters.local_sizes(shape, module, self.config.tensor_model_parallel_size)[1]


def attach(chunks: Sequence[GPTModel], shape: ModelShape, lora: LoraConfig, seed: int) -> None:
    """Freeze the chunks and give them adapters that change nothing: A as PEFT draws it, B zero.

    A depends on ``seed``, layer and module alone, not on the layout. The chunks' weights have been loaded.
    Their embedding's output requires a gradient from now on: recomputed layers, and those whose own
    parameters are taken out of autograd, have a backward only if their input does.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        add(chunk, shape, lora)
        for layer in chunk.decoder.layers:
            _initialize(layer, shape, lora, seed)
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_require_gradient)


def add(chunk: GPTModel, shape: ModelShape, lora: LoraConfig) -> None:
    """Give a model adapters of zeros."""
    for layer in chunk.decoder.layers:
        layer.add_module(adapters.ADAPTERS, LayerAdapters(layer, chunk.config, shape, lora))


def merge(chunk: GPTModel) -> None:
    """Put the adapters' changes into the weights, and take the adapters away."""
    for layer in chunk.decoder.layers:
        for adapted in adapted_of(layer).values():
            adapted.merge()
        delattr(layer, adapters.ADAPTERS)


def _require_gradient(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


@torch.no_grad()
def _initialize(layer: TransformerLayer, shape: ModelShape, lora: LoraConfig, seed: int) -> None:
    number = layer.layer_number - 1  # Megatron counts from 1
    names = adapters.AdapterNames(shape, lora, parallel_state.get_tensor_model_parallel_world_size())
    rank = parallel_state.get_tensor_model_parallel_rank()
    for module, adapter in layer.get_submodule(adapters.ADAPTERS).named_children():
        name = f"decoder.layers.{number}.{adapters.ADAPTERS}.{module}.{adapters.A}"
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        whole = torch.empty(names.size(name))
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        adapter.get_parameter(adapters.A).copy_(names.part_of(name, whole, rank))


def adapted_layers(chunks: Iterable[nn.Module]) -> Iterator[Adapted]:
    """The linear layers with adapters of these models, or of parts of them."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, LayerAdapters):
                yield from module.adapted.values()


def adapted_of(layer: nn.Module) -> dict[str, Adapted]:
    """A transformer layer's linear layers with adapters, by their paths in it."""
    return {path: found for child in layer.children() if isinstance(child, LayerAdapters)
            for path, found in child.adapted.items()}  # fmt: skip


@contextmanager
def switched_off(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the models compute what they would without adapters."""
    found = list(adapted_layers(chunks))
    for adapted in found:
        adapted.enabled = False
    try:
        yield
    finally:
        for adapted in found:
            adapted.enabled = True
