"""All cells, in the order in which they say most, and the files made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.testbed import preferences, report, trajectories
from benchmarks.testbed.methods import CORE
from benchmarks.testbed.store import COMPUTE, FRONT, Store


def everything(
    store: Store,
    out: Path,
    regimes: Sequence[str],
    methods: Sequence[str],
    *,
    fronts: bool,
    picture: bool,
    workers: int,
) -> Iterator[Path]:
    """Compute what is not there yet, then write results, tables and picture, whose paths come back."""
    work = [one for one in ordered(regimes, methods) if fronts or one[2] != FRONT]
    compute(store, work, workers)
    result = report.collected(store)
    if picture:
        result["trajectories"] = trajectories.traced(store)
        yield trajectories.draw(result["trajectories"], out / "trajectories.png")
    yield report.write_results(result, out / "results.json")
    yield report.write_tables(result, out / "tables.md")


def compute(store: Store, work: Sequence[tuple[str, str, str]], workers: int) -> None:
    """Every result of ``work``; with several processes the cells first, on which the others build."""
    with tqdm(total=len(work), desc="results", smoothing=0.05) as bar:
        if workers == 1:
            for one in work:
                bar.set_postfix_str(" ".join(one).rstrip())
                store.get(*one)
                bar.update()
            return
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            for part in ([one for one in work if not one[2]], [one for one in work if one[2]]):
                for done in as_completed([pool.submit(store.get, *one) for one in part]):
                    done.result()
                    bar.update()


def ordered(regimes: Sequence[str], methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """Regime, method and kind of all results, those that say most first."""
    core = [name for name in CORE if name in methods]
    over = [name for name in preferences.METHODS_OF_FRONTS if name in methods]
    of_fronts = [name for name in regimes if name in preferences.REGIMES_OF_FRONTS]
    return [
        *((regime, name, "") for name in core for regime in regimes),
        *((regime, name, FRONT) for name in over for regime in of_fronts),
        *((regime, name, COMPUTE) for name in core for regime in regimes),
        *((regime, name, "") for name in methods if name not in core for regime in regimes),
    ]
