"""All cells, in the order in which they say most, and the files made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.testbed.cells import Plan, keep, kept, measured
from benchmarks.testbed.methods import CORE, METHODS, Setting
from benchmarks.testbed.preferences import METHODS_OF_FRONTS, REGIMES_OF_FRONTS, FrontPlan, front_of


def everything(
    out: Path, plan: Plan, regimes: Sequence[str], methods: Sequence[str], *, fronts: bool, picture: bool
) -> Iterator[Path]:
    """Compute what is not there yet, then write results, tables and picture, whose paths come back."""
    from benchmarks.testbed import report, trajectories

    compute(out / "cells", plan, regimes, methods, fronts)
    result = report.collected(out / "cells")
    yield report.write_results(result, out / "results.json")
    yield report.write_tables(result, out / "tables.md")
    if picture:
        yield trajectories.draw(trajectories.traced(out, plan), out / "trajectories.png")


def compute(folder: Path, plan: Plan, regimes: Sequence[str], methods: Sequence[str], fronts: bool) -> None:
    """Every cell, and the fronts of those that have one."""
    core = [name for name in methods if name in CORE]
    work = [(regime, name, False) for name in core for regime in regimes]
    if fronts:
        over = [regime for regime in regimes if regime in REGIMES_OF_FRONTS]
        work += [(regime, name, True) for name in METHODS_OF_FRONTS if name in methods for regime in over]
    work += [(regime, name, False) for name in methods if name not in core for regime in regimes]
    with tqdm(work, desc="cells") as bar:
        for regime, name, over_preferences in bar:
            bar.set_postfix_str(f"{name} in {regime}")
            (front if over_preferences else cell)(folder, regime, name, plan)


def cell(folder: Path, regime: str, name: str, plan: Plan) -> dict[str, Any]:
    """The finished cell, from its file or computed now."""
    path = folder / f"{regime}--{name}.json"
    found = kept(path, plan.told(METHODS[name]))
    if found is None:
        keep(path, measured(regime, name, plan))
        found = kept(path, plan.told(METHODS[name]))
        assert found is not None, path
    return found


def front(folder: Path, regime: str, name: str, plan: Plan) -> dict[str, Any]:
    """The finished front over preferences, around what tuning chose in the cell."""
    around = Setting(**cell(folder, regime, name, plan)["tuned"])
    path, front_plan = folder / f"{regime}--{name}--front.json", FrontPlan(plan)
    found = kept(path, front_plan.told(METHODS[name], around))
    if found is None:
        found = front_of(regime, name, front_plan, around)
        keep(path, found)
    return found
