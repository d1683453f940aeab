"""What the processes of benchmarks/peers.py run. Only they import ``peer_worker`` and all that is heavy."""

from __future__ import annotations

from multiprocessing.connection import Connection

from peer_jobs import Job, Order, Task


def prepare(connection: Connection, order: Order) -> None:
    """See ``peer_worker.prepare``."""
    import peer_worker

    peer_worker.prepare(connection, order)


def work(connection: Connection, job: Job, task: Task) -> None:
    """See ``peer_worker.work``."""
    import peer_worker

    peer_worker.work(connection, job, task)
