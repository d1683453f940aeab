"""Reduce-scatter and all-gather over CPU ranks: torch's by gloo, and ours in ``runtime/collectives.py``.

``torchrun --nproc_per_node 2 benchmarks/shard_exchange.py [--elements N] [--rounds K]`` prints the least wall
time of each and of other sizes of a chunk, taken in turns, for a float32 buffer of N elements.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist

from gapo_mega.engine.megatron.runtime import collectives

CHUNKS_KIB = (256, 512, 1024, 2048, 4096)


def measured(rounds: int, contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least seconds of each over its turns; a turn ends when every rank is done."""
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(options.elements // ranks * ranks)  # stays zero, however often it is summed
    own = whole.view(ranks, -1)[rank]

    def reduce_by(kib: int) -> Callable[[], object]:
        def run() -> None:
            with mock.patch.object(collectives, "_CHUNK_BYTES", kib << 10):
                collectives.reduce_scatter_tensor(own, whole)

        return run

    contenders: dict[str, Callable[[], object]] = {
        "reduce-scatter, torch": lambda: dist.reduce_scatter_tensor(own, whole),
        **{f"reduce-scatter, chunks of {kib} KiB": reduce_by(kib) for kib in CHUNKS_KIB},
        "all-gather, torch": lambda: dist.all_gather_into_tensor(whole, own),
        "all-gather, ours": lambda: collectives.all_gather_into_tensor(whole, own),
    }
    found = measured(options.rounds, contenders)
    if rank == 0:
        print(f"{ranks} ranks, {whole.numel() * 4 >> 20} MiB, least of {options.rounds}")
        for name, seconds in found.items():
            print(f"{name:<34} {seconds:7.3f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
