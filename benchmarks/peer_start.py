"""What the processes of benchmarks/peers.py run. Only they import ``peer_worker`` and all that is heavy."""

from __future__ import annotations

from multiprocessing.connection import Connection

from peer_jobs import Job, Order, Task


def prepare(connection: Connection, order: Order) -> None:
    """Import ``peer_worker`` in this process, and prepare model and batch."""
    import peer_worker

    peer_worker.prepare(connection, order)


def work(connection: Connection, job: Job, task: Task) -> None:
    """Import ``peer_worker`` in this process, and do ``task`` with the job's contender."""
    import peer_worker

    peer_worker.work(connection, job, task)
