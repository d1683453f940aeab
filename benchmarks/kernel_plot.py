"""The picture of benchmarks/kernels.py: fractions of the ceilings against N, and ratios of whole steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernel_contenders import MGDA, OURS, STACK, UPGRAD
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]
Panel = tuple[str, int | None]  # element type, threads

PEERS = {MGDA: "#D55E00", STACK: "#0072B2", UPGRAD: "#009E73"}


def draw(result: Record, path: Path) -> None:
    """A column per element type and number of threads; rows: Gram matrix, combination, whole step."""
    panels = list(dict.fromkeys((record["dtype"], record["threads"]) for record in result["gram"]))
    figure = Figure(figsize=(3.6 * len(panels) + 2.4, 9.6), dpi=150, layout="constrained")
    axes = figure.subplots(3, len(panels), squeeze=False, sharey="row")
    for column, panel in enumerate(panels):
        dtype, threads = panel
        title = dtype if threads is None else f"{dtype}, {threads} thread{'s' if threads > 1 else ''}"
        _fractions(axes[0][column], result["gram"], panel)
        axes[0][column].set_title(title)
        _fractions(axes[1][column], result["combine"], panel)
        _ratios(axes[2][column], result["step"], panel)
    for row, section in enumerate(("gram", "combine")):
        highest = max((r["fraction_of_ceiling"] for r in result[section] if r["kind"] == "ours"), default=1.0)
        # A single outlier must not press the rest together.
        axes[row][0].set_ylim(0, min(1.5, max(1.1, 1.05 * highest)))
    axes[0][0].set_ylabel("Gram matrix:\nfraction of the read ceiling")
    axes[1][0].set_ylabel("combination:\nfraction of a bare loop")
    axes[2][0].set_ylabel("whole step:\npeer's time / ours, largest N")
    for row, title in ((0, "rows m"), (2, "peer")):
        # A peer may be missing in one panel.
        shown = {}
        for panel_axes in axes[row]:
            handles, labels = panel_axes.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
        last = axes[row][-1]
        last.legend(
            shown.values(), shown, title=title, frameon=False, loc="upper left", bbox_to_anchor=(1, 1)
        )
    figure.suptitle(f"{result['machine']['device']}, {result['machine']['date'][:10]}")
    figure.savefig(path)


def _of_panel(records: list[Record], panel: Panel) -> list[Record]:
    return [
        record
        for record in records
        if (record["dtype"], record["threads"]) == panel and "failed" not in record
    ]


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#e4e8ec")
    axes.set_axisbelow(True)


def _fractions(axes: Axes, records: list[Record], panel: Panel) -> None:
    ours = [record for record in _of_panel(records, panel) if record["contender"] == OURS]
    counts = sorted({record["rows"] for record in ours})
    colours = colormaps["viridis"]
    for index, m in enumerate(counts):
        points = sorted((r["elements"], r["fraction_of_ceiling"]) for r in ours if r["rows"] == m)
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            color=colours(0.9 * index / max(1, len(counts) - 1)),
            label=str(m),
        )
    axes.axhline(1.0, color="#64707d", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({record["elements"] for record in ours}), minor=False)
    axes.set_xlabel("elements N of a row")
    _style(axes)


def _ratios(axes: Axes, records: list[Record], panel: Panel) -> None:
    here = _of_panel(records, panel)
    largest = max(record["elements"] for record in here)
    here = [record for record in here if record["elements"] == largest]
    counts = sorted({record["rows"] for record in here})
    present = [peer for peer in PEERS if any(record["contender"] == peer for record in here)]
    width = 0.8 / max(1, len(present))
    for index, peer in enumerate(present):
        ratios = {record["rows"]: record["times_ours"] for record in here if record["contender"] == peer}
        places = [counts.index(m) + (index - (len(present) - 1) / 2) * width for m in ratios]
        bars = axes.bar(places, list(ratios.values()), 0.9 * width, color=PEERS[peer], label=peer)
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    axes.axhline(1.0, color="#64707d", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(counts)), [str(m) for m in counts])
    axes.set_xlabel("rows m")
    _style(axes)
