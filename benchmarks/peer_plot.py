"""The picture of benchmarks/peers.py: time and memory of an update, against that for one objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]

COLOURS = {"autograd": "#0072B2", "autojac": "#D55E00", "autogram": "#009E73", "ours": "#3b2a73"}


def draw(result: Record, path: Path) -> None:
    """Two panels of bars, a group per contender and a bar per number of objectives."""
    shown = [r for r in result["records"] if r["kind"] != "single"]
    names = list(dict.fromkeys(record["contender"] for record in shown))
    counts = result["settings"]["objectives"]
    figure = Figure(
        figsize=(12, 0.9 + 0.26 * len(names) * (len(counts) + 0.7)), dpi=150, layout="constrained"
    )
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    _bars(time_axes, shown, names, counts, lambda record: float(record["ratio"]))
    _bars(memory_axes, shown, names, counts, lambda record: float(record["surplus"]["allocated"]))
    time_axes.set_xlabel("time: multiples of the stack's step for one objective")
    memory_axes.set_xlabel("extra peak memory: multiples of one gradient")
    time_axes.axvline(1.0, color="#64707d", linewidth=1, linestyle="--")
    time_axes.set_yticks(range(len(names)), names)
    time_axes.invert_yaxis()
    model, machine, settings = result["model"], result["machine"], result["settings"]
    threads = settings["threads"]
    figure.suptitle(
        f"{machine['device']}, {threads} thread{'s' if threads > 1 else ''}, {machine['date'][:10]}: "
        f"Llama of {model['parameters'] / 1e6:.3g} M parameters in fp32, {settings['sequences']} x "
        f"{settings['length']} tokens",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _bars(axes: Axes, records: list[Record], names: list[str], counts: list[int], value: Any) -> None:
    height = 0.8 / len(counts)
    for index, m in enumerate(counts):
        here = {r["contender"]: r for r in records if r["objectives"] == m}
        # A paler bar for fewer objectives; the colour is the kind's.
        strength = (index + 1) / len(counts)
        for place, name in enumerate(names):
            at = place + (index - (len(counts) - 1) / 2) * height
            record = here[name]
            if "failed" in record:
                axes.text(0, at, " dropped out", va="center", fontsize=6, color="#64707d")
                continue
            bars = axes.barh(
                [at],
                [value(record)],
                0.9 * height,
                color=COLOURS[record["kind"]],
                alpha=0.35 + 0.65 * strength,
            )
            axes.bar_label(bars, labels=[f"{value(record):.2f} (m = {m})"], fontsize=6, padding=2)
    axes.margins(x=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", color="#e4e8ec")
    axes.set_axisbelow(True)
