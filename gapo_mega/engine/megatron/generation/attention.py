"""Attention of new tokens to rotated keys and values that were kept, for rows padded on the left.

The queries that share a key-value head are queries of one attention, so that keys and values are never
repeated. Rotary positions are columns of the padded batch: attention depends on their differences alone.

Shapes: S columns of prompts, U different prompts, B rows, G groups of R query heads, C channels of a head,
T columns of prompts and responses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def visible_columns(padding_U: Tensor, columns: int) -> Tensor | None:
    """bool ``[U, 1, S, S]``: which keys (last dimension) a query of a prompt attends to.

    ``None`` if no prompt is padded: all up to its own. Padding attends to itself, because attention to
    nothing has no value.
    """
    if not bool(padding_U.any()):
        return None
    column_S = torch.arange(columns, device=padding_U.device)
    past_SS = column_S <= column_S[:, None]
    itself_SS = column_S == column_S[:, None]
    return (past_SS & (column_S >= padding_U[:, None, None]) | itself_SS)[:, None]


class KeyValueCache:
    """What the layers of one chunk keep of a lane: keys and values ``[B, G, T, C]`` each.

    Args:
        padding_B: columns of padding on the left of every row, int64.
        columns: T.
        scale: of the products of queries and keys.
        dtype: of what will be kept.
    """

    def __init__(self, padding_B: Tensor, columns: int, scale: float, dtype: torch.dtype) -> None:
        self.filled = 0  # columns
        self._columns, self._scale = columns, scale
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._added_B11T: Tensor | None = None  # to scores: minus infinity at padding, else 0
        if bool(padding_B.any()):
            hidden_BT = torch.arange(columns, device=padding_B.device) < padding_B[:, None]
            added_BT = torch.zeros(hidden_BT.shape, dtype=dtype, device=padding_B.device)
            self._added_B11T = added_BT.masked_fill_(hidden_BT, -torch.inf)[:, None, None]

    def keep(self, index_B: Tensor) -> None:
        """Keep only these rows, in this order. Copies no row that stays where it was."""
        count = len(index_B)
        (to_M,) = (index_B != torch.arange(count, device=index_B.device)).nonzero(as_tuple=True)
        from_M = index_B[to_M]
        for kept in (self._keys, self._values):
            for layer, whole in enumerate(kept):
                used = whole[:, :, : self.filled]
                used[to_M] = used[from_M]
                kept[layer] = whole[:count]
        if self._added_B11T is not None:
            self._added_B11T = self._added_B11T[index_B]

    def read_prompts(
        self, heads_SUGHC: Tensor, values_SUGC: Tensor, visible_U1SS: Tensor | None, inverse_B: Tensor
    ) -> Tensor:
        """The next layer's attention within the prompts: ``[S, U, G * R * C]``.

        Args:
            heads_SUGHC: rotated queries and, as the last head of a group, its rotated key.
            values_SUGC: the groups' values.
            visible_U1SS: of ``visible_columns``.
            inverse_B: int64, the prompt of every row.
        """
        keys_UGSC = heads_SUGHC[:, :, :, -1].permute(1, 2, 0, 3)
        values_UGSC = values_SUGC.permute(1, 2, 0, 3)
        self._keys.append(self._room_for(keys_UGSC, inverse_B))
        self._values.append(self._room_for(values_UGSC, inverse_B))
        queries = heads_SUGHC[:, :, :, :-1].permute(1, 2, 3, 0, 4).flatten(1, 2)
        mixed = functional.scaled_dot_product_attention(
            queries,
            keys_UGSC,
            values_UGSC,
            attn_mask=visible_U1SS,
            is_causal=visible_U1SS is None,
            scale=self._scale,
            enable_gqa=queries.shape[1] != keys_UGSC.shape[1],
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)

    def _room_for(self, prompts_UGSC: Tensor, inverse_B: Tensor) -> Tensor:
        """``[B, G, T, C]`` that begins with every row's prompt."""
        self.filled = prompts_UGSC.shape[2]
        sizes = (len(inverse_B), prompts_UGSC.shape[1], self._columns, prompts_UGSC.shape[3])
        whole = prompts_UGSC.new_empty(sizes)
        whole[:, :, : self.filled] = prompts_UGSC[inverse_B]
        return whole

    def next_column(self) -> None:
        """Before the layers read one more token of every row."""
        self.filled += 1

    def read_column(self, layer: int, heads_BGHC: Tensor, values_BGC: Tensor) -> Tensor:
        """A layer's attention of the newest token to itself and all before it: ``[B, G * R * C]``."""
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self.filled - 1] = heads_BGHC[:, :, -1]
        values[:, :, self.filled - 1] = values_BGC
        mixed_BGRC = functional.scaled_dot_product_attention(
            heads_BGHC[:, :, :-1],
            keys[:, :, : self.filled],
            values[:, :, : self.filled],
            attn_mask=None if self._added_B11T is None else self._added_B11T[..., : self.filled],
            scale=self._scale,
        )
        return mixed_BGRC.flatten(1)
