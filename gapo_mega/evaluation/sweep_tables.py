"""The tables of a sweep in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLOURS = {"finished": "green", "failed": "red", "running": "cyan", "part": "yellow"}


def points_table(rows: Sequence[tuple[int, str, str, int | None]], warm_start: Mapping[str, str]) -> Table:
    """The states of points.

    Args:
        rows: number, name, state and steps done (None: not told) of every point.
        warm_start: its state by its name; empty without one.
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("point", justify="right", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("state", no_wrap=True)
    with_steps = any(steps is not None for *_, steps in rows)
    if with_steps:
        table.add_column("steps", justify="right", no_wrap=True)
    for name, state in warm_start.items():
        table.add_row("-", escape(name), _coloured(state))
    for index, name, state, steps in rows:
        shown = [] if not with_steps else [str(steps or 0)]
        table.add_row(str(index), escape(name), _coloured(state), *shown)
    return table


def front_table(results: Mapping[str, Any]) -> list[Table]:
    """The candidates' means with their place on the front, and every method's measures."""
    front, names = results["front"], results["objectives"]
    candidates = Table(
        title="Held-out means over seeds; non-dominated: share of bootstrap draws",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    candidates.add_column("setting", overflow="fold")
    candidates.add_column("seeds", justify="right", no_wrap=True)
    for name in names:
        candidates.add_column(escape(name), justify="right", no_wrap=True)
    candidates.add_column("front", no_wrap=True)
    candidates.add_column("non-dominated", justify="right", no_wrap=True)
    for found in front["candidates"]:
        candidates.add_row(
            escape(found["name"]),
            str(len(found["seeds"])),
            *(f"{found['mean'][name]:.4g}" for name in names),
            "yes" if found["on_front"] else "",
            _number(found["nondominated"], ".0%"),
        )
    methods = Table(
        title=f"Methods; hypervolume of all: {_number(results['hypervolume'])}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    methods.add_column("method", overflow="fold")
    for column in ("points", "on front", "hypervolume", "epsilon", "IGD+"):
        methods.add_column(column, justify="right", no_wrap=True)
    for name, found in front["methods"].items():
        measures = (_number(found[key]) for key in ("hypervolume", "epsilon", "igd_plus"))
        methods.add_row(escape(name), str(found["points"]), str(found["on_union_front"]), *measures)
    return [candidates, methods]


def print_tables(tables: Sequence[Table]) -> None:
    """Print them one below the other."""
    console = Console()
    for table in tables:
        console.print(table)


def _coloured(state: str) -> str:
    colour = _COLOURS.get(state)
    return state if colour is None else f"[{colour}]{state}[/{colour}]"


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)
