"""The weights that ``decoder.py`` needs, read from a Megatron model, and whether it is one that it knows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional

from gapo_mega.engine.megatron.generation.products import Gated, Product, gated, product, with_change
from gapo_mega.engine.megatron.model.context import ContextAttention
from gapo_mega.engine.megatron.model.lora import adapted_of
from gapo_mega.engine.megatron.model.modules import RMSNorm
from gapo_mega.engine.megatron.model.packing import PackedAttention

logger = logging.getLogger(__name__)

# Fields of Megatron's configuration that change what a model computes, with what the decoder computes. A
# release that lacks one of them computes it so, too.
_COMPUTED: dict[str, Any] = {
    "activation_func": functional.silu,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "apply_query_key_layer_scaling": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "fp4": None,
    "fp8": None,
    "fp32_residual_connection": False,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "layernorm_zero_centered_gamma": False,
    "linear_attention_freq": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_moe_experts": None,
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
}
_MODULES: dict[str, tuple[type, ...]] = {
    "input_layernorm": (RMSNorm,),
    "self_attention": (SelfAttention,),
    "self_attention.linear_qkv": (ColumnParallelLinear,),
    "self_attention.q_layernorm": (RMSNorm, IdentityOp, type(None)),
    "self_attention.k_layernorm": (RMSNorm, IdentityOp, type(None)),
    "self_attention.core_attention": (DotProductAttention, PackedAttention, ContextAttention),
    "self_attention.linear_proj": (RowParallelLinear,),
    "pre_cross_attn_layernorm": (IdentityOp,),
    "cross_attention": (IdentityOp,),
    "pre_mlp_layernorm": (RMSNorm,),
    "mlp": (MLP,),
    "mlp.linear_fc1": (ColumnParallelLinear,),
    "mlp.linear_fc2": (RowParallelLinear,),
}


def obstacle(model: GPTModel) -> str | None:
    """What of a chunk the decoder does not compute, in a few words; ``None``: it computes the whole chunk."""
    return next(_obstacles(model), None)


def tell(obstacles: Iterable[str | None]) -> None:
    """Log what keeps a run's chunks from the decoder, each once."""
    for obstacle in sorted({obstacle for obstacle in obstacles if obstacle is not None}):
        logger.warning(
            "generation runs Megatron's layers, which takes longer than our decoder: it lacks %s", obstacle
        )


def _obstacles(model: GPTModel) -> Iterator[str]:
    config = model.config
    for name, computed in _COMPUTED.items():
        found = vars(config).get(name, computed)
        if found != computed:
            yield f"{name} {found!r}"
    if model.position_embedding_type != "rope" or type(model.rotary_pos_emb) is not RotaryEmbedding:
        yield f"position embedding {model.position_embedding_type}"
        return
    rotary = model.rotary_pos_emb
    if rotary.seq_len_interpolation_factor is not None or 2 * len(rotary.inv_freq) != config.kv_channels:
        yield "rotary positions that are interpolated, or of a part of a head"
    if config.num_query_groups % config.tensor_model_parallel_size:
        yield "groups of queries that tensor ranks share"
    for layer in model.decoder.layers:
        yield from _obstacles_of_layer(layer)
    if model.pre_process and not (
        type(model.embedding) is LanguageModelEmbedding
        and type(model.embedding.word_embeddings) is VocabParallelEmbedding
    ):
        yield "the embedding"
    if model.post_process and not (
        type(model.decoder.final_layernorm) is RMSNorm and type(model.output_layer) is ColumnParallelLinear
    ):
        yield "the output layer or the norm before it"


def _obstacles_of_layer(layer: nn.Module) -> Iterator[str]:
    if type(layer) is not TransformerLayer:
        yield type(layer).__name__
        return
    for path, known in _MODULES.items():
        found: Any = layer
        for name in path.split("."):
            found = getattr(found, name)
        if type(found) not in known:
            yield f"{path} {type(found).__name__}"
            return


@dataclass(frozen=True)
class Norm:
    """An RMSNorm that rounds where ``modules.RMSNorm`` does."""

    weight_D: Tensor  # [D], or [R + 1, D] for the heads of a group
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``"""
        width = x.shape[-1:]
        if x.dtype == torch.float32:
            return functional.rms_norm(x, width, eps=self.eps).mul_(self.weight_D)
        return functional.rms_norm(x.float(), width, eps=self.eps).to(x.dtype).mul_(self.weight_D)

    @classmethod
    def of(cls, module: RMSNorm) -> Norm:
        return cls(module.weight, module.eps)


@dataclass(frozen=True)
class Embedding:
    """A tensor rank's part of the table of tokens."""

    part_VD: Tensor
    first: int  # token of its first row
    is_whole: bool

    def __call__(self, tokens: Tensor) -> Tensor:
        """``[...] -> [..., D]``: 0 for tokens in other ranks' parts."""
        if self.is_whole:
            return functional.embedding(tokens, self.part_VD)
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= len(self.part_VD))
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.part_VD)
        return found.masked_fill_(elsewhere[..., None], 0.0)

    @classmethod
    def of(cls, model: GPTModel) -> Embedding:
        table = model.embedding.word_embeddings
        is_whole = model.config.tensor_model_parallel_size == 1
        return cls(table.weight, int(table.vocab_start_index), is_whole)


@dataclass(frozen=True)
class Layer:
    """A tensor rank's part of one layer."""

    input_norm: Norm
    qkv: Product
    head_shape: tuple[int, int, int]  # groups, R + 2 heads of a group, channels
    head_norm: Norm | None
    projection: Product
    mlp_norm: Norm
    gated: Gated
    down: Product


def layers_of(model: GPTModel) -> list[Layer]:
    """The layers of a chunk."""
    return [_layer(layer) for layer in model.decoder.layers]


def _layer(layer: TransformerLayer) -> Layer:
    attention, mlp, config = layer.self_attention, layer.mlp, layer.config
    queries = config.num_attention_heads // config.num_query_groups
    groups = config.num_query_groups // config.tensor_model_parallel_size
    changes = {path: adapted.part for path, adapted in adapted_of(layer).items()}
    head_norm = None
    if isinstance(attention.q_layernorm, RMSNorm):
        query_C, key_C = attention.q_layernorm.weight, attention.k_layernorm.weight
        weights = torch.cat((query_C.expand(queries, -1), key_C[None]))
        head_norm = Norm(weights, attention.q_layernorm.eps)
    return Layer(
        input_norm=Norm.of(layer.input_layernorm),
        qkv=with_change(
            product(attention.linear_qkv.weight, attention.linear_qkv.bias),
            changes.get("self_attention.linear_qkv"),
        ),
        head_shape=(groups, queries + 2, config.kv_channels),
        head_norm=head_norm,
        projection=with_change(
            product(attention.linear_proj.weight), changes.get("self_attention.linear_proj")
        ),
        mlp_norm=Norm.of(layer.pre_mlp_layernorm),
        gated=gated(mlp.linear_fc1.weight, changes.get("mlp.linear_fc1")),
        down=with_change(product(mlp.linear_fc2.weight), changes.get("mlp.linear_fc2")),
    )


def output_of(model: GPTModel) -> Callable[[Tensor], Tensor]:
    """From hidden states behind the last layer ``[N, D]`` to this tensor rank's logits ``[N, V]``."""
    norm = Norm.of(model.decoder.final_layernorm)
    shared = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
    head = product(weight)
    return lambda x_ND: head(norm(x_ND))
