"""Torchrun for the processes of one machine, which listen on its loopback alone.

    python -m gapo_mega.runs.local_torchrun --nproc-per-node N ... SCRIPT ...

Torchrun's own ``--standalone`` listens on all interfaces, without authentication. Here the meeting place is
opened on 127.0.0.1, a new one for every attempt, so that nothing of an earlier attempt is found there.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from gapo_mega.runs import exits
from gapo_mega.runs.error_output import show
from gapo_mega.scratch import TEMPORARY, scratch

BACKEND = "loopback"
_HOST = "127.0.0.1"


class Loopback(RendezvousHandler):
    """The one agent of a job meets itself; its workers meet at a store on this machine's loopback."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._round = 0
        self._store: Any = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        with socket.create_server((_HOST, 0)) as listener:
            port = listener.getsockname()[1]
            # The store closes the descriptor that it is given.
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                _HOST,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=os.dup(listener.fileno()),
            )
        self._round += 1
        store = PrefixStore(f"{self._run_id}/{self._round}", self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(_HOST, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return None

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _handler(parameters: RendezvousParameters) -> RendezvousHandler:
    return Loopback(parameters.run_id)


def main() -> None:
    """Run torchrun with the arguments of this process, on one node, and end as its workers have ended."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if sys.platform == "linux":
        # Where the ranks' own connections listen, unless the user says otherwise.
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    rendezvous_handler_registry.register(BACKEND, _handler)
    meeting = ["--nnodes", "1", "--rdzv-backend", BACKEND, "--rdzv-endpoint", _HOST, "--local-addr", _HOST]
    with scratch(Path(tempfile.gettempdir()), f"{TEMPORARY}exits-", lasting=True) as (folder, _):
        os.environ[exits.FOLDER] = str(folder)
        try:
            torchrun([*meeting, *sys.argv[1:]])
            return
        except ChildFailedError as error:
            show(str(error))
            codes = [failure.exitcode for failure in error.failures.values()]
        except SignalException:
            codes = exits.left_in(folder)
    sys.exit(exits.status_of(codes))


if __name__ == "__main__":
    main()
