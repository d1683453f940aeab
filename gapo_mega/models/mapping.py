"""Hugging Face tensors <-> one tensor-parallel rank's Megatron parameters: pure tensor code.

Megatron names are those of a whole model (layer numbers count from its first layer, from 0), in
Megatron-core's local layer spec. Transformer Engine fuses the norms into the layers behind them, which
only changes their names; ``local_spec_name`` undoes that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gapo_mega.models.shape import ModelShape

OUTPUT_LAYER = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
ROUTER = "mlp.router.weight"
_LAYER_NUMBER = re.compile(r"(?<=\blayers\.)\d+")
_EXPERT_NUMBER = re.compile(r"(?<=\blocal_experts\.)\d+")
_HEAD_NORMS = ("q_layernorm.weight", "k_layernorm.weight")
_TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face tensors.

    Attributes:
        kind: ``replicated`` (one tensor, the same on all ranks), ``vocab`` (rows padded, then split),
            ``columns`` (second dimension split), ``gated`` (gate and up projection: every rank holds
            its rows of the one, then of the other) or ``qkv`` (Q, K and V rows interleaved by
            key/value group, the groups split).
        sources: Hugging Face names, ``{layer}`` standing for the layer number and ``{expert}`` for the
            expert's.
    """

    kind: Literal["replicated", "vocab", "columns", "gated", "qkv"]
    sources: tuple[str, ...]


# Megatron name -> rule, ``{layer}`` and ``{expert}`` standing for the numbers in both.
Table = Mapping[str, Rule]


def local_spec_name(name: str) -> str:
    """The local-spec name of a parameter that may carry Transformer Engine's fused name.

    Written against megatron-core's Transformer Engine spec, 0.16.1 and 0.19.2, and its layers 2.11 and 2.20.
    """
    for fused, plain in _TRANSFORMER_ENGINE_NAMES.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def is_expert(name: str) -> bool:
    """Whether a Megatron parameter belongs to one expert."""
    return _EXPERT_NUMBER.search(name) is not None


class WeightMap:
    """Both directions of the conversion for one model and one tensor-parallel size.

    Experts have their number in the whole layer, whatever rank holds them.

    Args:
        shape: the model.
        table: its family's rules.
        tensor: tensor-parallel size.
        padded_vocab: embedding rows over all ranks, padding included; none: the least possible.
        expert_tensor: tensor-parallel size of the experts; none: ``tensor``.

    Raises:
        ValueError: ``tensor`` does not divide the heads, groups, MLP width or padded vocabulary.
    """

    def __init__(
        self,
        shape: ModelShape,
        table: Table,
        tensor: int = 1,
        padded_vocab: int | None = None,
        expert_tensor: int | None = None,
    ) -> None:
        self.shape = shape
        self.tensor = tensor
        self.expert_tensor = tensor if expert_tensor is None else expert_tensor
        self.padded_vocab = shape.padded_vocab(tensor) if padded_vocab is None else padded_vocab
        self._table = {name: rule for name, rule in table.items() if _has_parameter(shape, name)}
        # Tensors that a tied model's files may hold although they repeat others: copy -> original.
        self.copies: dict[str, str] = {}
        if shape.tied:
            original = self._table[EMBEDDING].sources
            self.copies = dict(zip(table[OUTPUT_LAYER].sources, original, strict=True))
            self._table[OUTPUT_LAYER] = self._table[EMBEDDING]
        divided = {"kv_groups": shape.kv_groups, "padded vocabulary": self.padded_vocab}
        if shape.experts is None:
            divided["ffn"] = shape.ffn
        elif shape.ffn % self.expert_tensor:
            raise ValueError(
                f"parallel.expert_tensor: found {self.expert_tensor}, accepted: a divisor of the experts' "
                f"width {shape.ffn}"
            )
        for what, size in divided.items():
            if size % tensor:
                raise ValueError(
                    f"parallel.tensor: found {tensor}, accepted: a divisor of the model's {what} {size}"
                )

    def parts(self, name: str) -> int:
        """Tensor-parallel ranks that share the parameter ``name``, or hold copies of it."""
        return self.expert_tensor if is_expert(name) else self.tensor

    def checkpoint_key(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Where Megatron's ``sharded_state_dict`` puts a parameter: key, and place in the first dimensions.

        All layers' parameters of one name are one tensor ``[layers, ...]`` there, and all experts' one
        ``[layers, experts, ...]``, under the names that Transformer Engine's spec gives them, whatever spec
        the model has.
        """
        number = _LAYER_NUMBER.search(name)
        if number is None:
            return name, ()
        key = name.replace(f".{number.group()}.", ".", 1)
        expert = _EXPERT_NUMBER.search(key)
        if expert is not None:
            key = key.replace(f"local_experts.{expert.group()}.", "experts.", 1)
            return key, (int(number.group()), int(expert.group()))
        for fused, plain in _TRANSFORMER_ENGINE_NAMES.items():
            # Nothing is fused with the norm before a router.
            is_fused = self.shape.experts is None or not fused.startswith("mlp.")
            if is_fused and key.endswith(f".{plain}"):
                key = key.removesuffix(plain) + fused
        return key, (int(number.group()),)

    def stacked(self, name: str) -> tuple[int, ...]:
        """Sizes of the dimensions that ``checkpoint_key`` counts along."""
        sizes = (self.shape.num_layers, self.shape.mlps)
        return sizes[: len(self.checkpoint_key(name)[1])]

    def hf_names(self) -> frozenset[str]:
        """All tensors of the model's Hugging Face directory."""
        sources = [source for rule in self._table.values() for source in rule.sources]
        return frozenset(
            name
            for source in sources
            for layer in range(self.shape.num_layers)
            for name in self._by_expert(source, layer)
        )

    def names(self) -> list[str]:
        """All parameters of the whole model, embedding first; a tied output layer is not one."""
        patterns = [name for name in self._table if not self.is_copy(name)]
        layered = [name for name in patterns if "{layer}" in name]
        first = [name for name in patterns if name == EMBEDDING]
        last = [name for name in patterns if name not in layered and name not in first]
        layers = range(self.shape.num_layers)
        names = (name for layer in layers for pattern in layered for name in self._by_expert(pattern, layer))
        return [*first, *names, *last]

    def has(self, name: str) -> bool:
        """Whether the parameter is made of Hugging Face tensors."""
        return _pattern(name) in self._table

    def kind(self, name: str) -> str:
        """The ``Rule.kind`` of a parameter."""
        return self._find(name)[0].kind

    def sources(self, name: str) -> tuple[str, ...]:
        """Hugging Face names of the tensors that the Megatron parameter ``name`` is made of."""
        return self._find(name)[1]

    def is_copy(self, name: str) -> bool:
        """Whether it is a tied output layer, a parameter only on the last of several pipeline stages."""
        return self.shape.tied and name == OUTPUT_LAYER

    def to_megatron(self, name: str, read: Callable[[str], Tensor], rank: int) -> Tensor:
        """The part of parameter ``name`` of rank ``rank`` of its ``parts``; padding rows are zero.

        ``read`` gives a Hugging Face tensor by name. Raises ``ValueError`` when one has another
        shape than the model's.
        """
        rule, sources = self._find(name)
        tensors = [read(source) for source in sources]
        self._check_shapes(name, rule, sources, tensors)
        parts = self.parts(name)
        if rule.kind == "vocab":
            padding = tensors[0].new_zeros(self.padded_vocab - self.shape.vocab, *tensors[0].shape[1:])
            return torch.cat([tensors[0], padding]).chunk(self.tensor)[rank]
        if rule.kind == "columns":
            return tensors[0].chunk(parts, dim=1)[rank]
        if rule.kind == "gated":
            return torch.cat([tensor.chunk(parts)[rank] for tensor in tensors])
        if rule.kind == "qkv":
            groups = [self._by_group(tensor).chunk(self.tensor)[rank] for tensor in tensors]
            return torch.cat(groups, dim=1).flatten(0, 1)
        return tensors[0]

    def to_hf(self, name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole Hugging Face tensors from the parts of parameter ``name`` of all ranks that share it."""
        assert len(parts) == self.parts(name), f"{name}: {len(parts)} parts for {self.parts(name)} ranks"
        rule, sources = self._find(name)
        if rule.kind == "vocab":
            tensors = [torch.cat(list(parts))[: self.shape.vocab]]
        elif rule.kind == "columns":
            tensors = [torch.cat(list(parts), dim=1)]
        elif rule.kind == "gated":
            halves = [part.chunk(2) for part in parts]
            tensors = [torch.cat([half[i] for half in halves]) for i in range(2)]
        elif rule.kind == "qkv":
            whole = self._by_group(torch.cat(list(parts)))
            sizes = [rows // self.shape.kv_groups for rows in self._qkv_rows()]
            tensors = [piece.flatten(0, 1) for piece in torch.split(whole, sizes, dim=1)]
        else:
            tensors = [parts[0]]
        return dict(zip(sources, tensors, strict=True))

    def _find(self, name: str) -> tuple[Rule, tuple[str, ...]]:
        layer, expert = (
            number.group() if number else ""
            for number in (_LAYER_NUMBER.search(name), _EXPERT_NUMBER.search(name))
        )
        pattern = _pattern(name)
        if pattern not in self._table:
            raise ValueError(f"{name}: family {self.shape.family} has no tensor for this parameter")
        rule = self._table[pattern]
        return rule, tuple(source.format(layer=layer, expert=expert) for source in rule.sources)

    def _by_expert(self, pattern: str, layer: int) -> list[str]:
        """The names that ``pattern`` stands for in a layer: one, or one for every expert."""
        experts = range(self.shape.mlps if "{expert}" in pattern else 1)
        return [pattern.format(layer=layer, expert=expert) for expert in experts]

    def _by_group(self, tensor: Tensor) -> Tensor:
        """``[rows, ...] -> [groups, rows of a group, ...]``"""
        return tensor.reshape(self.shape.kv_groups, -1, *tensor.shape[1:])

    def _qkv_rows(self) -> tuple[int, int, int]:
        queries, keys = self.shape.heads * self.shape.head_dim, self.shape.kv_groups * self.shape.head_dim
        return queries, keys, keys

    def _check_shapes(self, name: str, rule: Rule, sources: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` unless every dimension has the size that the configuration promises."""
        shape = self.shape
        width = shape.heads * shape.head_dim if "self_attention" in name else shape.ffn
        one: dict[str, tuple[int, ...]] = {
            "vocab": (shape.vocab, shape.hidden),
            "columns": (shape.hidden, width),
            "replicated": self._replicated_size(name),
        }
        rows = {"gated": (shape.ffn, shape.ffn), "qkv": self._qkv_rows()}.get(rule.kind)
        columns = () if name.endswith(".bias") else (shape.hidden,)
        expected = [one[rule.kind]] if rows is None else [(count, *columns) for count in rows]
        for source, tensor, size in zip(sources, tensors, expected, strict=True):
            if tensor.shape != size:
                raise ValueError(
                    f"{source}: found the shape {list(tensor.shape)}, config.json promises {list(size)}"
                )

    def _replicated_size(self, name: str) -> tuple[int, ...]:
        if name == OUTPUT_LAYER:  # a score model's head
            return (1, self.shape.hidden)
        if name.endswith(ROUTER):
            return (self.shape.mlps, self.shape.hidden)
        if name.endswith(".bias"):  # its bias
            return (1,)
        return (self.shape.head_dim if name.endswith(_HEAD_NORMS) else self.shape.hidden,)


def _pattern(name: str) -> str:
    """The name in a ``Table`` for a parameter, which may carry Transformer Engine's."""
    return local_spec_name(_EXPERT_NUMBER.sub("{expert}", _LAYER_NUMBER.sub("{layer}", name)))


def _has_parameter(shape: ModelShape, name: str) -> bool:
    """Whether a model of this shape has a parameter that a family's table may list."""
    if name.endswith("linear_qkv.bias"):
        return shape.qkv_bias
    return shape.qk_norm or not name.endswith(_HEAD_NORMS)
