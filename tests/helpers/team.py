"""Several fake ranks in one process: a thread each, which wait for one another where ranks would."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from tests.helpers.fake_engine import FakeEngine, layout

Result = TypeVar("Result")


class Group:
    """Some ranks of a team, which tell one another a value each."""

    def __init__(self, ranks: list[int], seconds: float = 20) -> None:
        self._ranks = ranks
        self.size = len(ranks)
        self._barrier = threading.Barrier(len(ranks), timeout=seconds)
        self._values: dict[int, Any] = {}

    def gather(self, rank: int, value: Any) -> list[Any]:
        """The values of all its ranks in order, on every one of them."""
        self._values[rank] = value
        self._barrier.wait()
        values = [self._values[other] for other in self._ranks]
        self._barrier.wait()
        return values


class Member(FakeEngine):
    """One rank of a ``Team``."""

    def __init__(self, rank: int, world: int, data: int, groups: dict[str, list[Group]]) -> None:
        super().__init__(layout(rank, world, data))
        self._data = groups["data"][self.layout.tensor_rank]
        self._replica = groups["replica"][self.layout.data_rank]
        self._world = groups["world"][0]

    def gather_over_data(self, value: Any) -> list[Any]:
        return self._data.gather(self.layout.rank, value)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        first, *others = self.gather_over_data(tensor)
        return sum(others, start=first.clone())

    def broadcast_in_replica(self, value: Any) -> Any:
        # As bytes, for what no pickle carries would not reach the other ranks of a run.
        first = self.layout.tensor_rank == 0
        return pickle.loads(self._replica.gather(self.layout.rank, pickle.dumps(value) if first else b"")[0])

    def barrier(self) -> None:
        self._world.gather(self.layout.rank, None)


class Team:
    """A world of fake ranks: ``data`` replicas of ``world / data`` tensor ranks.

    ``seconds``: longest wait for one another.
    """

    def __init__(self, world: int, data: int, seconds: float = 20) -> None:
        tensor = world // data
        data_groups = [range(first, world, tensor) for first in range(tensor)]
        replicas = [range(first, first + tensor) for first in range(0, world, tensor)]
        groups = {
            name: [Group(list(ranks), seconds) for ranks in parts]
            for name, parts in {"data": data_groups, "replica": replicas, "world": [range(world)]}.items()
        }
        self.members = [Member(rank, world, data, groups) for rank in range(world)]

    def run(self, work: Callable[[Member], Result]) -> list[Result]:
        """``work`` on every rank at once; the results by rank. Raises what a rank raised."""
        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(work, self.members))
