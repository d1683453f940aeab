"""Tables beside the targets, the JSON file and the picture of benchmarks/kernels.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kernel_plot
from kernel_contenders import INSTALL_TORCHJD, MGDA, OURS, STACK, UPGRAD
from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
Key = tuple[Any, ...]

MIB = 2**20
BUSY = 0.25  # processors


@dataclass(frozen=True)
class Target:
    """A bound on a figure: at least, or (``most``) at most."""

    bound: float
    most: bool = False

    def met(self, value: float) -> bool:
        """Whether the value meets the bound; NaN never does."""
        return value <= self.bound if self.most else value >= self.bound

    def mark(self, value: float, text: str) -> str:
        """The text with its verdict."""
        return f"[green]{text} ✓[/]" if self.met(value) else f"[red]{text} ✗[/]"


COMBINE = Target(0.90)
EXTRA_BYTES = Target(MIB, most=True)
RESIDUAL = Target(1e-9, most=True)


def gram_target(m: int) -> Target:
    """Fraction of the read ceiling. More rows need more multiply-adds for every element that is read."""
    return Target(0.95 if m <= 6 else 0.85)


def step_target(device: str, peer: str) -> Target | None:
    """How many times our time the peer takes, at least."""
    bounds = {MGDA: (8.0, 3.0), STACK: (6.0, 2.0)}
    return Target(bounds[peer][device == "cuda"]) if peer in bounds else None


def qp_target(device: str, m: int) -> Target | None:
    """The most seconds of a call; None where there is no target."""
    return Target(100e-6 if device == "cuda" else 50e-6, most=True) if m == 8 else None


# --- files ------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write(result: Record, folder: Path) -> list[Path]:
    """``kernels-DEVICE.json`` and ``kernels-DEVICE.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = result["settings"]
    name = f"kernels-{settings['device']}{'-staggered' if settings['stagger'] else ''}"
    text = json.dumps(finite(result), indent=1, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    kernel_plot.draw(result, folder / f"{name}.png")
    return [folder / f"{name}.json", folder / f"{name}.png"]


# --- tables -----------------------------------------------------------------------------------------


def print_tables(result: Record, console: Console | None = None) -> None:
    """Print one table per section."""
    # In a file or a pipe there is no width to keep to.
    console = console or (Console() if Console().is_terminal else Console(width=160))
    device = result["settings"]["device"]
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    console.print(f"{machine['device']} | isa {machine['isa']} | {versions}", soft_wrap=True)
    if machine["removed_from_environment"]:
        console.print(f"left out of the environment: {machine['removed_from_environment']}")
    if machine["busy_before"] > BUSY:
        console.print(
            f"other programs kept {machine['busy_before']:.1f} of {machine['cores']} processors busy at the "
            "start: figures of calls with several threads tell little",
            style="yellow",
            soft_wrap=True,
        )
    if not result["torchjd"]:
        console.print(INSTALL_TORCHJD, style="yellow", markup=False)
    console.print(_ceilings(result))
    console.print(_gram(result))
    console.print(_combine(result))
    console.print(_step(result, device))
    console.print(_memory(result))
    console.print(_accuracy(result))
    console.print(_qp(result, device))
    for line in failures(result):
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def failures(result: Record) -> list[str]:
    """One line for every peer that could not take part, and why."""
    lines: dict[str, None] = {}
    for section in ("gram", "combine", "step", "qp", "memory", "accuracy"):
        for record in result[section]:
            if "failed" in record:
                kind = record.get("dtype", record.get("family"))
                lines[f"{record['contender']} dropped out ({section}, {kind}): {record['failed']}"] = None
    return list(lines)


def grouped(records: Iterable[Record], fields: Sequence[str]) -> dict[Key, dict[str, Record]]:
    """Records by the values of ``fields``, then by contender."""
    groups: dict[Key, dict[str, Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[field] for field in fields), {})[record["contender"]] = record
    return groups


CONFIGURATION = ("dtype", "threads", "elements", "rows")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _configuration(key: Key) -> list[str]:
    dtype, threads, elements, rows = key
    return [dtype, "-" if threads is None else str(threads), f"2^{elements.bit_length() - 1}", str(rows)]


def _sorted(groups: dict[Key, dict[str, Record]]) -> list[tuple[Key, dict[str, Record]]]:
    """Sorted by element type in the order asked for, then by threads and rows; N runs fastest."""
    types = list(dict.fromkeys(key[0] for key in groups))
    return sorted(
        groups.items(),
        key=lambda item: (types.index(item[0][0]), item[0][1] or 0, item[0][3], item[0][2]),
    )


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def _cell(record: Record | None, show: Callable[[Record], str]) -> str:
    """A dash for what is not there, and for what failed."""
    return "-" if record is None or "failed" in record else show(record)


def _peers(groups: dict[Key, dict[str, Record]]) -> list[str]:
    kinds = {name: record.get("kind") for group in groups.values() for name, record in group.items()}
    return [name for name, kind in kinds.items() if kind == "peer"]


def _best(group: dict[str, Record]) -> float:
    """The ceiling, in GB/s."""
    return max(float(record["gb_per_second"]) for record in group.values() if record["kind"] == "ceiling")


def _ceilings(result: Record) -> Table:
    table = _table("ceilings of this machine", "threads", "read GB/s", "copy GB/s", "fp64 multiply-adds / s")
    for record in result["ceilings"]:
        rate = record["fp64_multiply_adds_per_second"]
        table.add_row(
            "-" if record["threads"] is None else str(record["threads"]),
            f"{record['read_gb_per_second']:.2f}",
            f"{record['copy_gb_per_second']:.2f}",
            f"{rate / 1e9:.2f}e9" if rate else "-",
        )
    return table


def _gram(result: Record) -> Table:
    groups = grouped(result["gram"], CONFIGURATION)
    peers = _peers(groups)
    title = "Gram matrix (target: fraction of the read ceiling >= 0.95 to m = 6, >= 0.85 beyond)"
    table = _table(
        title,
        *("type", "threads", "N", "m", "ours", "GB/s", "read ceiling", "of ceiling", "of roofline"),
        *(f"{peer} / ours" for peer in peers),
    )
    for key, group in _sorted(groups):
        ours = group[OURS]
        fraction, roofline = ours["fraction_of_ceiling"], ours.get("fraction_of_roofline")
        table.add_row(
            *_configuration(key),
            seconds(ours["seconds"]),
            f"{ours['gb_per_second']:.2f}",
            f"{_best(group):.2f}",
            gram_target(key[3]).mark(fraction, f"{fraction:.3f}"),
            "-" if roofline is None else f"{roofline:.3f}",
            *(_cell(group.get(peer), lambda r: f"{r['times_ours']:.2f}") for peer in peers),
        )
    return table


def _combine(result: Record) -> Table:
    groups = grouped(result["combine"], CONFIGURATION)
    peers = _peers(groups)
    table = _table(
        "combination, in place (target: fraction of a bare loop's speed >= 0.90)",
        *("type", "threads", "N", "m", "ours", "GB/s", "loop GB/s", "of loop"),
        *(f"{peer} / ours" for peer in peers),
    )
    for key, group in _sorted(groups):
        ours = group[OURS]
        fraction = ours["fraction_of_ceiling"]
        table.add_row(
            *_configuration(key),
            seconds(ours["seconds"]),
            f"{ours['gb_per_second']:.2f}",
            f"{_best(group):.2f}",
            COMBINE.mark(fraction, f"{fraction:.3f}"),
            *(_cell(group.get(peer), lambda r: f"{r['times_ours']:.2f}") for peer in peers),
        )
    return table


def _step(result: Record, device: str) -> Table:
    groups = grouped(result["step"], CONFIGURATION)
    peers = _peers(groups)
    heads = []
    for peer in peers:
        target = step_target(device, peer)
        heads.append(f"{peer} / ours" + (f" (>= {target.bound:g})" if target else ""))
    columns = ("type", "threads", "N", "m", "ours", "GB/s")
    table = _table("whole step: Gram matrix, weights, combination", *columns, *heads)

    def show(peer: str, record: Record) -> str:
        target, ratio = step_target(device, peer), record["times_ours"]
        return target.mark(ratio, f"{ratio:.2f}") if target else f"{ratio:.2f}"

    for key, group in _sorted(groups):
        table.add_row(
            *_configuration(key),
            seconds(group[OURS]["seconds"]),
            f"{group[OURS]['gb_per_second']:.2f}",
            *(_cell(group.get(peer), partial(show, peer)) for peer in peers),
        )
    return table


def _memory(result: Record) -> Table:
    table = _table(
        "peak memory on top of the rows (target for ours: < 1 MiB)",
        *("type", "N", "m", "section", "ours MiB", "peers MiB"),
    )
    for key, group in grouped(result["memory"], ("dtype", "elements", "rows", "section")).items():
        dtype, elements, rows, section = key
        ours = group[OURS]["extra_bytes"]
        peers = [
            f"{name} {_cell(record, lambda r: format(r['extra_bytes'] / MIB, '.1f'))}"
            for name, record in group.items()
            if name != OURS
        ]
        mark = EXTRA_BYTES.mark(ours, f"{ours / MIB:.2f}")
        size = f"2^{elements.bit_length() - 1}"
        table.add_row(dtype, size, str(rows), section, mark, ", ".join(peers))
    return table


def _accuracy(result: Record) -> Table:
    groups = grouped(result["accuracy"], ("dtype", "elements", "rows"))
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    table = _table(
        "largest error of a Gram entry over |g_i| |g_j|, against float64: Gaussian rows; hard rows",
        *("type", "N", "m", *names),
    )
    for (dtype, elements, rows), group in groups.items():
        cells = [_cell(group.get(n), lambda r: f"{r['error']:.1e}; {r['error_hard']:.1e}") for n in names]
        table.add_row(dtype, f"2^{elements.bit_length() - 1}", str(rows), *cells)
    return table


def _qp(result: Record, device: str) -> Table:
    limit = "100 us" if device == "cuda" else "50 us"
    table = _table(
        f"minimum-norm point (targets for ours: m = 8 <= {limit}, KKT residual <= 1e-9)",
        *("m", "Gram matrices", "contender", "a call", "worst KKT residual"),
    )
    for record in result["qp"]:
        if "failed" in record:
            continue
        m, value = record["rows"], record["seconds"]
        target = qp_target(device, m) if record["contender"] not in (MGDA, UPGRAD) else None
        residual = record.get("residual")
        shown = "another problem" if residual is None else f"{residual:.1e}"
        if residual is not None and record["contender"] not in (MGDA, UPGRAD):
            shown = RESIDUAL.mark(residual, shown)
        call = seconds(value)
        table.add_row(
            str(m), record["family"], record["contender"], target.mark(value, call) if target else call, shown
        )
    return table
