"""M accumulated gradients in M - 1 rows and Megatron's buffer, for passes that alternate objectives."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core import parallel_state
from torch import Tensor

from gapo_mega.engine.megatron.gradients.shard import GradientShard, exchange
from gapo_mega.engine.megatron.model.buffers import (
    bucket_groups_of,
    data_group_of,
    is_first_instance,
    numbered,
)
from gapo_mega.engine.megatron.model.main_parameters import owned
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.model.reduction import is_summed_over_tensor_ranks


class RowBuffer:
    """Tracks which objective's accumulated gradient Megatron's buffer holds, and swaps in another.

    The objective whose gradient comes next has its sum in the buffer; the other sums lie in the rows. The
    reduction adds the buffers of all data ranks. So exactly one rank may hold the sum of earlier
    microbatches, which is already reduced: its owner with the distributed optimizer (of its first instance),
    else the first of the ranks that hold this part of the model. Some
    norms' gradients are also summed over tensor ranks (those of queries and keys always, the others with
    sequence parallelism): tensor rank 0 alone holds these. Everywhere else the buffer starts at zero.
    """

    def __init__(self, trainable: Trainable, shard: GradientShard, rows: Sequence[list[Tensor]]) -> None:
        """``rows``: memory for all sums but one, each shaped like the shard."""
        self._trainable = trainable
        self._shard = shard
        self._free = list(rows)
        self._place: dict[int, list[Tensor]] = {}
        self._held: int | None = None

    def bring(self, objective: int) -> None:
        """Put this objective's sum (zero at first) into the buffer, ready for a backward."""
        if self._held is None:
            self._shard.clear()
        elif objective != self._held:
            self._set_aside(self._held, objective)
        self._held = objective
        self._keep_own_sum_only()

    def rows(self) -> list[list[Tensor]]:
        """The sums in the objectives' order; one of them is the shard itself."""
        assert self._held is not None
        places = {**self._place, self._held: self._shard.pieces}
        return [places[k] for k in sorted(places)]

    def _set_aside(self, old: int, new: int) -> None:
        """Move the sum of ``old`` from the buffer into a row, and that of ``new`` into the buffer."""
        if new in self._place:
            row = self._place.pop(new)
            exchange(self._shard.pieces, row)
        else:
            row = self._free.pop()
            for kept, piece_data in zip(row, self._shard.pieces, strict=True):
                kept.copy_(piece_data)
            self._shard.clear()
        self._place[old] = row

    def _keep_own_sum_only(self) -> None:
        model = self._trainable.model
        self._trainable.optimizer.zero_grad()  # param.grad may alias the buffer, as in Trainable.zero_grad
        for parameter in model.params_with_grad:
            parameter.grad_added_to_main_grad = False
        for group in bucket_groups_of(model):
            group.reset()
        distributed = model.ddp_config.use_distributed_optimizer
        for kind, buffer in numbered(model):
            first = data_group_of(kind).rank() == 0
            for bucket in buffer.buckets:
                start, end = owned(model, kind, bucket.grad_data.numel())
                if not (is_first_instance() if distributed else first):
                    start = end
                bucket.grad_data[:start].zero_()
                bucket.grad_data[end:].zero_()
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
            for name, parameter in trained:
                if is_summed_over_tensor_ranks(model.config, name, parameter):
                    parameter.main_grad.zero_()
