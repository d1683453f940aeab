"""Token sequences of pairs and chats, as a cache of tokens keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gapo_mega.data.token_cache import PIECE, Arrays, Kind, TokenCache

Item = TypeVar("Item")
_AT_ONCE = 1000  # items given to the tokenizer together: its Python integers take 36 bytes a token


@dataclass(frozen=True)
class Sequences:
    """Those of consecutive items that are short enough, with equally many sequences of each.

    Attributes:
        index: the places of these items, from 0.
        ids: int64 ``[T]``, of one item after the other.
        masks: bool ``[T]`` beside each of ``ids``; none where no token is marked.
    """

    index: Sequence[int]
    ids: Sequence[Tensor]
    masks: Sequence[Tensor] = ()

    @classmethod
    def joined(cls, parts: Iterable[Sequences], size: int) -> Sequences:
        """``parts`` of ``size`` items each, as one."""
        index: list[int] = []
        ids: list[Tensor] = []
        masks: list[Tensor] = []
        for number, part in enumerate(parts):
            index += (number * size + place for place in part.index)
            ids += part.ids
            masks += part.masks
        return cls(index, ids, masks)

    def packed(self) -> tuple[dict[str, Any], Arrays]:
        """As a cache keeps them."""
        arrays: Arrays = {
            "index": np.array(self.index, dtype=np.int32),
            "ends": np.cumsum([len(ids_T) for ids_T in self.ids], dtype=np.int64),
            "ids": torch.cat([torch.empty(0, dtype=torch.int64), *self.ids]).to(torch.int32).numpy(),
            "masks": torch.cat([torch.empty(0, dtype=torch.bool), *self.masks]).numpy(),
        }
        return {}, arrays

    @classmethod
    def unpacked(cls, about: Mapping[str, Any], arrays: Arrays) -> Sequences:
        """Inverse of ``packed``. Raises ``ValueError`` for parts that do not fit together."""
        lengths = np.diff(arrays["ends"], prepend=0).tolist()
        ids, masks = (torch.from_numpy(arrays[part]) for part in ("ids", "masks"))
        if len(ids) != sum(lengths) or len(masks) not in (0, len(ids)):
            raise ValueError("lacks tokens")
        return cls(
            arrays["index"].tolist(),
            torch.split(ids.to(torch.int64), lengths),
            torch.split(masks, lengths) if len(masks) else (),
        )


def kind_of(name: str) -> Kind[Sequences]:
    """How items of that name are kept."""
    return Kind(name, Sequences.packed, Sequences.unpacked)


def sequences_of(
    kind: Kind[Sequences],
    items: Sequence[Item],
    encode: Callable[[Sequence[Item]], Sequences],
    cache: TokenCache | None,
    key: Callable[[Sequence[Item]], str] | None,
) -> Sequences:
    """``encode`` of all ``items``. Collective where ``cache`` is shared; ``key`` is ``TokenCache``'s."""

    def piece(some: Sequence[Item]) -> Sequences:
        parts = (some[i : i + _AT_ONCE] for i in range(0, len(some), _AT_ONCE))
        return Sequences.joined(map(encode, parts), _AT_ONCE)

    if cache is None:
        return piece(items)
    return Sequences.joined(cache.encoded(kind, items, len(items), piece, key), PIECE)
