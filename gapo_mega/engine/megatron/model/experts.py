"""Experts in the place of a layer's MLP."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor, nn
from torch.nn import functional

from gapo_mega.engine.megatron.runtime.cpu import device


class Watch(Protocol):
    """What looks on while a router chooses. N tokens, of which some may be padding."""

    def attach(self, layer: int, logits_NE: Tensor, real_N: Tensor) -> Tensor:
        """The logits ``[N, E]`` that the router goes on with."""
        ...

    def chose(self, layer: int, map_NE: Tensor, real_N: Tensor) -> None:
        """The experts that tokens go through, bool ``[N, E]``."""
        ...


class RowWatch(Protocol):
    """What looks on while rows go to the ranks of their experts, in forwards that have a graph."""

    def numbers(self, hidden_SBD: Tensor) -> Tensor:
        """int64 ``[N]``: a number for every row of this rank, N = S B."""
        ...

    def dispatched(self, numbers_N: Tensor, map_NE: Tensor) -> None:
        """Of the rows of all ranks: their numbers, and which of this rank's E experts they go through.

        An expert gets its rows in this order. Called before experts run.
        """
        ...


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router with a plain product, in the model's type, as transformers' routers compute it.

    The product of megatron-core 0.16.1 needs Transformer Engine. ``watch``: looks on, in forwards that tell
    which tokens are real.
    """

    watch: Watch | None = None

    def gating(self, input: Tensor) -> Tensor:
        """``[S, B, D] -> [S, B, E]``"""
        return self.product(input, self.weight)

    def product(self, input: Tensor, weight: nn.Parameter) -> Tensor:
        """``input W^T``; what takes its gradient from autograd replaces this method of an instance."""
        return functional.linear(input, weight)

    def routing(
        self, logits: Tensor, padding_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, Tensor]:
        """``[S, B, E] -> [N, E], [N, E]``: probabilities and choices.

        ``padding_mask``: true for real tokens.
        """
        if self.watch is None:
            plain: tuple[Tensor, Tensor] = super().routing(logits, **others)
            return plain
        assert padding_mask is not None, "a watched router is told which tokens are real"
        real_N = _own_part(padding_mask, len(logits)).reshape(-1)
        attached_NE = self.watch.attach(self.layer_number, logits.flatten(0, 1), real_N)
        probabilities_NE, map_NE = super().routing(attached_NE.view_as(logits), **others)
        self.watch.chose(self.layer_number, map_NE, real_N)
        return probabilities_NE, map_NE

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Nothing: these routers have no bias. Megatron compiles this method, which takes seconds."""


def _own_part(mask_SB: Tensor, columns: int) -> Tensor:
    """This tensor rank's ``columns`` of a mask: Megatron splits it on the first stage only."""
    if len(mask_SB) == columns:
        return mask_SB
    rank = parallel_state.get_tensor_model_parallel_rank()
    return mask_SB[rank * columns : (rank + 1) * columns]


class Dispatcher(MoEAllGatherTokenDispatcher):  # type: ignore[misc]
    """Brings tokens to the ranks that hold their experts, from ranks with unequal numbers of them.

    Ranks of several data ranks share experts, and their microbatches are as wide as their own longest
    sequences. Megatron's dispatcher gathers equal numbers: the ranks with fewer add rows that no expert gets.
    """

    watch: RowWatch | None = None

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``[S, B, D], [N, E], [N, E] -> [most, D], [most, E]``, with N = S B."""
        hidden_ND, probs_NE = super().dispatch_preprocess(hidden_states, routing_map, probs)
        self._own = len(hidden_ND)
        self._numbers_N: Tensor | None = None
        # The first forward of a recomputed layer has no graph.
        if self.watch is not None and torch.is_grad_enabled():
            self._numbers_N = self.watch.numbers(hidden_states)
        self.routing_map: Tensor
        if self.ep_size == 1:
            return hidden_ND, probs_NE
        most = torch.tensor(self._own, device=hidden_ND.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.tp_ep_group)
        missing = (0, 0, 0, int(most) - self._own)
        self.routing_map = functional.pad(self.routing_map, missing)
        if self._numbers_N is not None:
            self._numbers_N = functional.pad(self._numbers_N, missing[2:])
        return functional.pad(hidden_ND, missing), functional.pad(probs_NE, missing)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, D], [N, E] -> [R N, D], [R N, E]``, of R ranks."""
        dispatched: tuple[Tensor, Tensor] = super().token_dispatch(hidden_states, probs)
        if self.watch is not None and self._numbers_N is not None:
            numbers_N, ranks = self._numbers_N, self.tp_ep_group.size()
            if ranks > 1:
                numbers_N = numbers_N.new_empty(ranks * len(numbers_N))
                dist.all_gather_into_tensor(numbers_N, self._numbers_N, group=self.tp_ep_group)
            first = self.local_expert_indices[0]
            self.watch.dispatched(numbers_N, self.routing_map[:, first : first + self.num_local_experts])
        return dispatched

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """``[most, D] -> [S, B, D]``"""
        restored: Tensor = super().combine_postprocess(hidden_states[: self._own])
        return restored


def over_data_ranks() -> bool:
    """Whether data ranks share experts, so that none can run a forward or backward without the others."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return bool(tensor % parallel_state.get_expert_tensor_and_model_parallel_world_size() != 0)


def most_among_sharers(count: int) -> int:
    """The largest ``count`` of the data ranks that share experts with this one. Collective over them."""
    return _largest([count])[0] if over_data_ranks() else count


def assert_in_step(passes: int) -> None:
    """Data ranks that share experts run equally many ``passes``. Collective over them."""
    if over_data_ranks():
        most, least = _largest([passes, -passes])
        assert most == -least, f"ranks that share experts run {-least} to {most} passes"


def _largest(numbers: list[int]) -> list[int]:
    found = torch.tensor(numbers, device=device())
    dist.all_reduce(
        found, op=dist.ReduceOp.MAX, group=parallel_state.get_expert_tensor_and_model_parallel_group()
    )
    largest: list[int] = found.tolist()
    return largest


def use_own_router(layer: ModuleSpec) -> None:
    """Put our router into the spec of a layer with experts."""
    layer.submodules.mlp.submodules.router = Router
    # Checkpoints name the norm before a router as with Transformer Engine, which fuses it with nothing.
    layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)


def use_own_dispatchers(model: nn.Module) -> None:
    """Replace the dispatchers of a model's experts, which Megatron chooses by name."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.token_dispatcher = Dispatcher(
                layer.num_local_experts, layer.local_expert_indices, layer.config, get_default_pg_collection()
            )
