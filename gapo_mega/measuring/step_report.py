"""The table and the file of ``gapo-mega benchmark step``."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gapo_mega.config import Config
from gapo_mega.measuring.step import PHASES

MIB = 1 << 20


def circumstances(config: Config, world: int, rounds: int) -> dict[str, Any]:
    """The machine, versions and settings that the figures belong to."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU with {torch.get_num_threads()} threads a process"
    return {
        "date": date.today().isoformat(),
        "device": device,
        "machine": platform.machine(),
        "world_size": world,
        "rounds": rounds,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "config": config.model_dump(mode="json", exclude={"output_dir", "logging", "checkpoint"}),
    }


def check_target(path: Path) -> None:
    """Raise ``ValueError`` unless ``path`` can be written, as far as one can tell beforehand."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--out: found {path}, accepted: a file in a folder that can be written to")


def write(path: Path, result: dict[str, Any]) -> None:
    """The result as JSON. Raises ``ValueError`` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out: {path} cannot be written: {error}") from error


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """One row per strategy: time as a ratio to the baseline, phases, and memory beside the baseline's."""
    console = console or Console(width=max(Console().width, 132))  # output to a file is not cut
    baseline = result["strategies"][0]
    table = Table(title=f"train phase of one update on {result['world_size']} x {result['device']}")
    columns = ("m", "strategy", "s/step", "ratio", "range", "passes ratio", *PHASES, "rows", "extra peak")
    for column in columns:
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in result["strategies"]:
        phases = [f"{row['phases_seconds'][p] / row['seconds']:.1%}" for p in PHASES]
        extra = row["peak_bytes"] - baseline["peak_bytes"]
        table.add_row(
            str(row["objectives"]),
            row["name"],
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.2f}",
            # One round has no range.
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}" if result["rounds"] > 1 else "-",
            f"{row['passes_ratio']:.2f}",
            *phases,
            _mib(row["row_bytes"]),
            _mib(extra),
        )
    console.print(table)
    kinds = {**result["bytes"], "activations": baseline["peak_bytes"]}
    text = ", ".join(f"{kind} {_mib(size)}" for kind, size in kinds.items())
    console.print(f"bytes with one objective: {text}", soft_wrap=True)
    console.print(
        "m: objectives. ratio: to the step with one objective of the same round (median). passes ratio: the "
        "same of forwards and backwards alone. rows: gradients held beside Megatron's buffer. extra peak: "
        "what a step allocates at its peak, above that of the step with one objective. Bytes: of the rank "
        "with the most.",
        style="dim",
        soft_wrap=True,
    )


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
