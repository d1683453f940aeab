"""Which server answers which prompt of a data-parallel rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

Server = TypeVar("Server")


def servers_of(
    prompts: Sequence[Sequence[int]], servers: Sequence[Server], data_rank: int, data_ranks: int
) -> list[Server]:
    """The server of every row.

    Ranks share servers evenly, whichever are more. A rank with several takes them in turn, and leaves the
    samples of a prompt, which are adjacent rows, to one: the prompt is read once there.
    """
    own = servers[data_rank::data_ranks] or [servers[data_rank % len(servers)]]
    groups = [len(list(rows)) for _, rows in groupby(prompts, key=tuple)]
    return [own[number % len(own)] for number, size in enumerate(groups) for _ in range(size)]
