"""Table and JSON file of benchmarks/peers.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]

MIB = 2**20
BUSY = 0.25  # processors
STACK_NAMES = {"hf": "transformers", "ours": "Megatron"}


def write(result: Record, path: Path) -> None:
    """Write JSON; a value that is not finite is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def print_table(result: Record, console: Console | None = None) -> None:
    """Print one table per number of objectives, and why peers dropped out."""
    # In a file or a pipe there is no width to keep to.
    console = console or (Console() if Console().is_terminal else Console(width=150))
    machine, model, settings = result["machine"], result["model"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    console.print(f"{machine['device']} | isa {machine['isa']} | {versions}", soft_wrap=True, markup=False)
    console.print(
        f"{model['parameters'] / 1e6:.1f} M parameters, gradient of {model['gradient_bytes'] / MIB:.0f} MiB; "
        f"{settings['sequences']} sequences of {settings['length']} tokens, {settings['threads']} threads, "
        f"attention of transformers: {settings['attention']}",
        soft_wrap=True,
        markup=False,
    )
    if machine["busy_before"] > BUSY:
        console.print(
            f"other programs kept {machine['busy_before']:.1f} of {machine['cores']} processors busy at the "
            "start: times tell little",
            style="yellow",
        )
    for m in settings["objectives"]:
        console.print(_table([r for r in result["records"] if r["objectives"] == m], m))
    for line in failures(result):
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def failures(result: Record) -> list[str]:
    """One line for every peer that could not take part, and why."""
    return [
        f"{record['contender']} dropped out (m = {record['objectives']}): {record['failed'].splitlines()[0]}"
        for record in result["records"]
        if "failed" in record
    ]


def _table(records: list[Record], m: int) -> Table:
    table = Table(title=f"one update, m = {m}", title_justify="left")
    for name in ("stack", "contender"):
        table.add_column(name)
    for name in (
        *("median s", "least s", "optimizer s", "x one objective", "least"),
        *("extra gradients: torch", "resident", "Gram error"),
    ):
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(STACK_NAMES[record["stack"]], record["contender"], *_figures(record))
    return table


def _figures(record: Record) -> list[str]:
    if "failed" in record:
        return ["dropped out"]
    error = record["gram_error"]
    return [
        f"{record['seconds']:.3f}",
        f"{record['least_seconds']:.3f}",
        f"{record['optimizer_seconds']:.3f}",
        f"{record['ratio']:.2f}",
        f"{record['least_ratio']:.2f}",
        f"{record['surplus']['allocated']:.2f}",
        f"{record['surplus']['resident']:.2f}",
        "" if error is None else f"{error:.0e}",
    ]
