"""Experts in the place of a layer's MLP."""

from __future__ import annotations

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn import functional


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router with a plain product, in the model's type, as transformers' routers compute it.

    The product of megatron-core 0.16.1 needs Transformer Engine.
    """

    def gating(self, input: Tensor) -> Tensor:
        """``[S, B, D] -> [S, B, E]``"""
        return functional.linear(input, self.weight)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Nothing: these routers have no bias. Megatron compiles this method, which takes seconds."""


def use_own_modules(layer: ModuleSpec) -> None:
    """Put our modules into the spec of a layer with experts."""
    layer.submodules.mlp.submodules.router = Router
    # Checkpoints name the norm before a router as with Transformer Engine, which fuses it with nothing.
    layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
