"""The sequences of data ranks that share trained experts, whose rows meet in the experts."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from gapo_mega.engine.megatron.model import experts


class Sharers:
    """Numbers the sequences of several ranks in turns.

    Sequence b of rank r among R of them has the number ``b R + r``, however many sequences they have.
    """

    def __init__(self, count: int = 1, index: int = 0) -> None:
        """``count``: R; ``index``: this rank's r."""
        self._count, self._index = count, index

    @classmethod
    def over_data_ranks(cls, tensor: int) -> Sharers:
        """The ranks that share experts with this one; it alone where those are of one replica.

        ``tensor``: tensor ranks, which have the same sequences.
        """
        if not experts.over_data_ranks():
            return cls()
        # Whole replicas share experts, and their tensor ranks are neighbours.
        ranks = parallel_state.get_expert_tensor_and_model_parallel_world_size()
        return cls(ranks // tensor, parallel_state.get_expert_tensor_and_model_parallel_rank() // tensor)

    def number(self, numbers_N: Tensor) -> Tensor:
        """This rank's sequences ``numbers_N`` among those of all."""
        return numbers_N * self._count + self._index

    def coefficients(self, own_MB: Tensor) -> Tensor:
        """The coefficients of all sequences, in the order of their numbers. Collective over the ranks."""
        if self._count == 1:
            return own_MB
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        rows, sequences = own_MB.shape
        most = experts.most_among_sharers(sequences)
        padded_MB = nn.functional.pad(own_MB, (0, most - sequences)).contiguous()
        gathered = padded_MB.new_empty(group.size() * rows, most)
        dist.all_gather_into_tensor(gathered, padded_MB, group=group)
        # One tensor rank of each replica: they have the same.
        by_rank_RMB = gathered.view(-1, rows, most)[:: group.size() // self._count]
        return by_rank_RMB.permute(1, 2, 0).reshape(rows, most * self._count)
