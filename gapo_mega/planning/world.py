"""Which process of how many this is, as the launcher's environment variables say.

Variables that a launcher left behind make a process wait for others that nobody has started, so everything
that does not fit together is refused before anybody waits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

# In the order in which a message names them.
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MOST = 10_000_000  # processes; more is a typing error
# What other launchers set to their number of tasks, without making them one job of torch.
_OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


@dataclass(frozen=True)
class World:
    """This process among those of its job; alone, it is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine: the number of its GPU
    address: str | None = None  # HOST:PORT where the processes meet; None: nobody to meet, or not asked for

    @property
    def others(self) -> str:
        """The ranks that this one waits for, in words."""
        if self.rank > 0:
            return "rank 0" if self.size == 2 else f"rank 0 and {self.size - 2} more"
        return "rank 1" if self.size == 2 else f"ranks 1 to {self.size - 1}"


def read_world(environment: Mapping[str, str] | None = None, *, to_meet: bool = False) -> World:
    """The world of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; ``to_meet``: and MASTER_ADDR, MASTER_PORT.

    Torchrun sets them all; without the first four the process is alone. Reads ``os.environ`` unless another
    ``environment`` is given. Raises ``ValueError`` for variables that do not fit together: it names the
    variable, what was found, what is accepted, and the command that unsets what a launcher left behind.
    """
    environment = os.environ if environment is None else environment
    found = [name for name in _NUMBERS if name in environment]
    if not found:
        return World()
    way_out = f"torchrun sets them all; for one process, `unset {' '.join(found)}`"
    numbers = {name: _number(name, environment[name], way_out) for name in found}
    for name in ("RANK", "WORLD_SIZE"):
        if name not in numbers:
            raise ValueError(
                f"{found[0]}: found {environment[found[0]]!r} without {name}, accepted: RANK and WORLD_SIZE "
                f"or neither ({way_out})"
            )
    size = numbers["WORLD_SIZE"]
    local_size = numbers.get("LOCAL_WORLD_SIZE", size)
    _check_range("WORLD_SIZE", size, 1, _MOST, "", way_out)
    _check_range("RANK", numbers["RANK"], 0, size - 1, f" with WORLD_SIZE {size}", way_out)
    _check_range("LOCAL_WORLD_SIZE", local_size, 1, size, f" with WORLD_SIZE {size}", way_out)
    local_rank = numbers.get("LOCAL_RANK", 0)
    _check_range("LOCAL_RANK", local_rank, 0, local_size - 1, f" with {local_size} processes here", way_out)
    if size == 1:
        return World(local_rank=local_rank)
    address = _address(environment, size, way_out) if to_meet else None
    return World(numbers["RANK"], size, local_rank, address)


def waiting_for(world: World, patience: timedelta) -> str:
    """Whom a process waits for, where, how long, and what to do if nobody is meant."""
    return (
        f"rank {world.rank} of {world.size} waits for {world.others} at {world.address}, at most "
        f"{_minutes(patience)} (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say so; for one process, unset "
        "RANK and WORLD_SIZE)"
    )


def did_not_meet(world: World, error: Exception, patience: timedelta) -> str:
    """What to say where the others did not come, with the network's ``error``."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"MASTER_ADDR, MASTER_PORT: rank {world.rank} of {world.size} did not meet {world.others} at "
        f"{world.address} ({reason}), accepted: all processes of the job, there within {_minutes(patience)}"
    )


def ranks_in_words(numbers: Sequence[int], shown: int = 8) -> str:
    """``rank 3``, ``ranks 3, 5``: of many the first ``shown``."""
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:shown]))}{more}"


def _minutes(patience: timedelta) -> str:
    return f"{patience.total_seconds() / 60:g} minutes"


def other_launcher(environment: Mapping[str, str] | None = None) -> str | None:
    """A sentence for the log where another launcher started several tasks that do not know of each other."""
    environment = os.environ if environment is None else environment
    if "RANK" in environment:
        return None
    for name, launcher in _OTHER_LAUNCHERS.items():
        tasks = environment.get(name, "")
        if tasks not in ("", "0", "1"):
            return (
                f"{name} is {tasks}, and RANK is not set: each of these tasks of {launcher} is a run of its "
                "own; for one run, start one task a machine that runs torchrun"
            )
    return None


def _number(name: str, text: str, way_out: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise ValueError(f"{name}: found {text[:40]!r}, accepted: a whole number, 0 or more ({way_out})")
    return int(text)


def _check_range(name: str, value: int, least: int, most: int, beside: str, way_out: str) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: found {value}{beside}, accepted: {least} to {most} ({way_out})")


def _address(environment: Mapping[str, str], size: int, way_out: str) -> str:
    host, port = environment.get("MASTER_ADDR", "").strip(), environment.get("MASTER_PORT", "")
    if not host:
        raise ValueError(
            f"MASTER_ADDR: found {environment.get('MASTER_ADDR')!r} with WORLD_SIZE {size}, accepted: the "
            f"host where the processes meet ({way_out})"
        )
    if re.fullmatch(r"[0-9]{1,5}", port) is None or not 1 <= int(port) <= 65535:
        raise ValueError(
            f"MASTER_PORT: found {environment.get('MASTER_PORT')!r} with WORLD_SIZE {size}, accepted: 1 to "
            f"65535 ({way_out})"
        )
    return f"{host}:{port}"
