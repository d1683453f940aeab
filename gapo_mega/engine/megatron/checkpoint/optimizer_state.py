"""Optimizer state in *model space*: tensors shaped like each parameter, independent of the layout.

Megatron-core 0.16 has its own ``fully_reshardable`` format for this, with three faults. It reads the
distributed optimizer's buffers as if there were no padding between buckets (tied embeddings and overlapped
reduction make several buckets). It leaves out Adam's ``step``, and all parameters share one after loading. It
cannot load SGD at all. So this module moves the tensors out of and into the optimizers itself, under
Megatron's key names, and leaves the resharding to Megatron's sharded tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from gapo_mega.engine.megatron.gradients.averages import AveragedRows
from gapo_mega.engine.megatron.model.main_parameters import Span, main_parameters, steps_taken
from gapo_mega.engine.megatron.runtime.groups import Groups

_MAIN = "param"  # the fp32 main copy of a bf16 parameter


@dataclass(frozen=True)
class _Piece:
    """Elements ``[start, end)`` of a flattened parameter and the optimizer's tensors for them."""

    start: int
    end: int
    tensors: dict[str, Tensor]


class OptimizerState:
    """Saves and loads the state of one model's optimizer."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: MegatronOptimizer,
        groups: Groups,
        averages: AveragedRows | None = None,
    ) -> None:
        """``parameters``: the model's, in an order that all ranks with them share.

        ``averages``: running means of the model's gradients, which lie as the optimizer's own tensors do.
        """
        # Experts have an optimizer of their own, with the same settings.
        self._optimizers = list(optimizer.chained_optimizers)
        self._optimizer = self._optimizers[0]
        self._inners: list[torch.optim.Optimizer] = [one.optimizer for one in self._optimizers]
        self._groups = groups
        self._parameters = [p for p in parameters if p.requires_grad]
        self._own_names = self._tensor_names()
        self._create()
        self._averages = averages
        self._pieces = dict(self._own_pieces())
        self.names = self._own_names + ([] if averages is None else averages.names)

    # -- step count ----------------------------------------------------------------------------
    @property
    def step(self) -> int:
        """Steps that Adam has taken; 0 for SGD, which does not count them."""
        return max(steps_taken(inner) for inner in self._inners)

    @step.setter
    def step(self, value: int) -> None:
        for inner in self._inners:
            if _counts_per_parameter(inner):
                for state in inner.state.values():
                    state["step"] = torch.full_like(state["step"], value)
            elif self._optimizer.config.optimizer == "adam":
                for group in inner.param_groups:  # the fused Adams count per group
                    group["step"] = value

    @property
    def averaged_updates(self) -> int:
        """Updates that the running means of the gradients have seen; 0 without any."""
        return 0 if self._averages is None else self._averages.updates

    @averaged_updates.setter
    def averaged_updates(self, value: int) -> None:
        if self._averages is not None:
            self._averages.updates = value

    # -- tensors -------------------------------------------------------------------------------
    def to_save(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Sharded tensors shaped like the parameters on the first rank that holds them, nothing on others.

        ``model_state``: the model's sharded state dict. Collective over those ranks, which send their pieces
        to the first one tensor at a time.
        """
        sharded = _by_parameter(model_state)
        own_ranges = {i: (self._pieces[p].start, self._pieces[p].end) for i, p in self._numbered()}
        held = {
            group: _gathered(own_ranges, group) for group in (self._groups.holders, self._groups.expert_data)
        }
        result: dict[str, Any] = {}
        for index, parameter in enumerate(self._parameters):
            group = self._data_group(parameter)
            owners = [ranges.get(index) for ranges in held[group]]
            piece = self._pieces.get(parameter)
            for name in self.names:
                own = None if piece is None else piece.tensors[name].detach().reshape(-1).float().cpu()
                whole = self._collect(own, owners, parameter.numel(), group)
                if whole is not None:
                    result[f"{index}.{name}"] = _like(
                        sharded[id(parameter)], name, whole.view(parameter.shape)
                    )
        return result

    def to_load(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Empty sharded tensors, shaped like the parameters that this rank holds a piece of."""
        sharded = _by_parameter(model_state)
        return {
            f"{index}.{name}": _like(sharded[id(parameter)], name, torch.empty(parameter.shape))
            for index, parameter in self._numbered()
            for name in self.names
        }

    @torch.no_grad()
    def load(self, loaded: dict[str, Any]) -> None:
        """Copy this rank's pieces from the filled tensors of ``to_load``."""
        for index, parameter in self._numbered():
            piece = self._pieces[parameter]
            for name, target in piece.tensors.items():
                whole: Tensor = loaded[f"{index}.{name}"]
                target.copy_(whole.reshape(-1)[piece.start : piece.end].view(target.shape))

    # -- inside the optimizers -------------------------------------------------------------------
    def _numbered(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(index, parameter) of the parameters that this rank holds a piece of."""
        return ((i, p) for i, p in enumerate(self._parameters) if p in self._pieces)

    def _tensor_names(self) -> list[str]:
        config = self._optimizer.config
        if config.optimizer == "adam":
            names = ["exp_avg", "exp_avg_sq"]
        else:
            names = ["momentum_buffer"] if config.sgd_momentum else []
        # Without bf16 the optimizer steps the model's own parameters.
        return [*names, _MAIN] if config.bf16 else names

    def _create(self) -> None:
        """Create the zeros that optimizers otherwise create in their first step; no update changes."""
        for inner in self._inners:
            for main in (main for group in inner.param_groups for main in group["params"]):
                for name in self._own_names:
                    if name != _MAIN and name not in inner.state[main]:
                        inner.state[main][name] = torch.zeros_like(main)
                if _counts_per_parameter(inner) and "step" not in inner.state[main]:
                    inner.state[main]["step"] = torch.zeros(())

    def _own_pieces(self) -> Iterator[tuple[nn.Parameter, _Piece]]:
        means = {} if self._averages is None else self._averages.by_parameter()
        for optimizer, inner in zip(self._optimizers, self._inners, strict=True):
            for parameter, main, start, end in main_parameters(optimizer):
                state = {**inner.state.get(main, {}), _MAIN: main}
                own = {name: state[name] for name in self._own_names}
                tensors = {**own, **means.get(parameter, {})}
                assert all(tensor.numel() == end - start for tensor in [main, *tensors.values()])
                yield parameter, _Piece(start, end, tensors)

    def _data_group(self, parameter: nn.Parameter) -> dist.ProcessGroup:
        """The ranks that have the same parameter, and of its state a piece each."""
        return self._groups.holders if getattr(parameter, "allreduce", True) else self._groups.expert_data

    def _collect(
        self,
        own: Tensor | None,
        owners: list[tuple[int, int] | None],
        numel: int,
        group: dist.ProcessGroup,
    ) -> Tensor | None:
        """Gather the pieces of one flat tensor on the group's first rank; the other ranks return None."""
        rank = dist.get_rank(group)
        if not isinstance(self._optimizer, DistributedOptimizer):
            return own if rank == 0 else None  # every data rank holds all of it
        if rank != 0:
            if own is not None:
                dist.send(own, dst=dist.get_global_rank(group, 0), group=group)
            return None
        whole = torch.empty(numel)
        for source, held in enumerate(owners):
            if held is None:
                continue
            target = whole[held[0] : held[1]]
            if source == 0:
                assert own is not None
                target.copy_(own)
            else:
                dist.recv(target, src=dist.get_global_rank(group, source), group=group)
        return whole


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def _gathered(ranges: dict[int, Span], group: dist.ProcessGroup) -> list[dict[int, Span]]:
    """The ranges of all ranks of the group, in their order."""
    held: list[dict[int, Span]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(held, ranges, group=group)
    return held


def _by_parameter(model_state: dict[str, Any]) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(sharded.data): sharded for sharded in nested_values(tensors)}


def _like(
    sharded: ShardedTensor | ShardedTensorFactory, name: str, data: Tensor
) -> ShardedTensor | ShardedTensorFactory:
    """``data`` as a tensor sharded like the parameter."""
    changes: dict[str, Any] = {"key": f"optimizer.state.{name}.{sharded.key}", "data": data}
    if isinstance(sharded, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(sharded, **changes)
