"""All cells, in the order in which they say most, and the files made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.testbed import preferences, report, trajectories
from benchmarks.testbed.cells import Plan
from benchmarks.testbed.methods import CORE
from benchmarks.testbed.store import COMPUTE, FRONT, Store


def everything(
    out: Path, plan: Plan, regimes: Sequence[str], methods: Sequence[str], *, fronts: bool, picture: bool
) -> Iterator[Path]:
    """Compute what is not there yet, then write results, tables and picture, whose paths come back."""
    store = Store(out / "cells", plan)
    work = [one for one in ordered(regimes, methods) if fronts or one[2] != FRONT]
    with tqdm(work, desc="cells") as bar:
        for regime, name, kind in bar:
            bar.set_postfix_str(f"{name} in {regime} {kind}".rstrip())
            store.get(regime, name, kind)
    result = report.collected(out / "cells")
    yield report.write_results(result, out / "results.json")
    yield report.write_tables(result, out / "tables.md")
    if picture:
        yield trajectories.draw(trajectories.traced(store), out / "trajectories.png")


def ordered(regimes: Sequence[str], methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """Regime, method and kind of all results, those that say most first."""
    core = [name for name in methods if name in CORE]
    over = [name for name in preferences.METHODS_OF_FRONTS if name in methods]
    of_fronts = [name for name in regimes if name in preferences.REGIMES_OF_FRONTS]
    return [
        *((regime, name, "") for name in core for regime in regimes),
        *((regime, name, FRONT) for name in over for regime in of_fronts),
        *((regime, name, COMPUTE) for name in core for regime in regimes),
        *((regime, name, "") for name in methods if name not in core for regime in regimes),
    ]
