"""The measurements of benchmarks/kernels.py, from settings to one dictionary."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import kernel_accuracy
import kernel_contenders
import kernel_memory
import kernel_qp
import kernel_timing
import psutil
import torch
from ceilings import Ceilings, CpuCeilings, CudaCeilings
from kernel_timing import Contender
from torch import Tensor
from tqdm import tqdm

from gapo_mega import ops

SECTIONS = 3  # Gram matrix, combination, whole step
QP_FAMILIES = 3
QP_ROWS = (2, 4, 6, 8)
CEILING_ROWS = 4
CHECKED = 1 << 12  # elements
LOOK_SECONDS = 0.5
LARGEST_CEILING = 25  # log2 of the elements of a row: far beyond every cache


@dataclass(frozen=True)
class Settings:
    """What to measure. ``sizes`` are base-2 logarithms."""

    device: str
    threads: list[int]
    rows: list[int]
    dtypes: list[str]
    sizes: list[int]
    rounds: int
    stagger: int = 0  # bytes by which each row begins further into its page

    @property
    def thread_counts(self) -> list[int]:
        """On a GPU the host's threads have no meaning: one pass."""
        return self.threads if self.device == "cpu" else self.threads[-1:]

    @property
    def largest(self) -> int:
        return 1 << self.sizes[-1]


def choose_device(name: str) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        ValueError: another name, or a GPU that is not there or not compiled for.
    """
    if name == "auto":
        runs = torch.cuda.is_available() and not ops.fault_of(torch.device("cuda"))
        return "cuda" if runs else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: found {name!r}, accepted: cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found 'cuda', accepted: cpu (torch sees no GPU)")
    fault = ops.fault_of(torch.device(name)) if name == "cuda" else ""
    if fault:
        raise ValueError(f"device: found 'cuda', accepted: cpu ({fault})")
    return name


def check_memory(settings: Settings) -> None:
    """Raise ``ValueError`` unless the rows, stacks of them and a little more fit into memory."""
    element = max(getattr(torch, dtype).itemsize for dtype in settings.dtypes)
    # Rows, the saved last one, a stack that stays (combination) and one that comes and goes.
    needed = (3 * settings.rows[-1] + 2) * settings.largest * element
    free = torch.cuda.mem_get_info()[0] if settings.device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"sizes: found {settings.sizes[-1]} with {settings.rows[-1]} rows, which takes "
            f"{needed / 2**30:.1f} GiB, accepted: what fits into the {free / 2**30:.1f} GiB that are free"
        )


def machine_facts(settings: Settings, ceilings: Ceilings, removed: str) -> dict[str, Any]:
    """What the figures depend on."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "torchjd", "numpy", "qpsolvers", "quadprog", "gapo-mega"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = settings.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_model(),
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        **{key: value for key, value in ops.info().items() if key != "threads"},
        "compiler_of_ceilings": ceilings.compiler,
        "versions": versions,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "removed_from_environment": removed,
        "busy_before": busy(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def busy() -> float:
    """Processors that other programs keep busy; call it while this process is idle."""
    count = psutil.cpu_count() or 1
    return round(psutil.cpu_percent(interval=LOOK_SECONDS) / 100 * count, 2)


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def run(settings: Settings, removed: str = "") -> dict[str, Any]:
    """Measure everything, as it goes into the JSON file.

    Raises:
        ValueError: not enough memory.
        RuntimeError: the ceilings do not compile, or a process for the memory measurement failed.
    """
    check_memory(settings)
    ceilings: Ceilings = CudaCeilings() if settings.device == "cuda" else CpuCeilings()
    qp_rows = [m for m in QP_ROWS if m <= max(settings.rows)]
    result: dict[str, Any] = {
        "machine": machine_facts(settings, ceilings, removed),
        "settings": asdict(settings),
        "torchjd": kernel_contenders.has_torchjd(),
        "ceilings": [],
        "qp": [],
        "memory": [],
        "accuracy": [],
        "gram": [],
        "combine": [],
        "step": [],
    }
    turns = settings.rounds + 1
    configurations = len(settings.dtypes) * len(settings.rows)
    timed = configurations * len(settings.thread_counts) * len(settings.sizes) * SECTIONS
    total = (len(settings.thread_counts) + QP_FAMILIES * len(qp_rows) + timed) * turns + 2 * configurations
    with tqdm(total=total, unit="round", smoothing=0.02) as bar:
        bar.set_description("ceilings")
        for threads in settings.thread_counts:
            result["ceilings"].append(machine_ceilings(settings, ceilings, threads, bar.update))
        bar.set_description("min_norm")
        kernel_contenders.set_threads(1)
        clock = kernel_timing.clock(settings.device, 1, settings.rounds)
        for m in qp_rows:
            result["qp"] += kernel_qp.measure(m, settings.device, clock, settings.rounds, bar.update)
        bar.set_description("memory")
        for dtype, m in ((dtype, m) for dtype in settings.dtypes for m in settings.rows):
            facts = {"dtype": dtype, "rows": m, "elements": settings.largest}
            threads = settings.thread_counts[-1]
            found = kernel_memory.measure(settings.device, dtype, m, settings.largest, threads)
            result["memory"] += [{**facts, "threads": threads, **record} for record in found]
            bar.update()
        for section, record in timed_records(settings, ceilings, bar):
            result[section].append(record)
    return result


def machine_ceilings(
    settings: Settings, ceilings: Ceilings, threads: int, on_round: Callable[[], Any]
) -> dict[str, Any]:
    """The best that each kind of loop reaches on long rows."""
    kernel_contenders.set_threads(threads)
    n = 2 ** min(settings.sizes[-1], LARGEST_CEILING)
    rows = kernel_contenders.make_rows(CEILING_ROWS, n, torch.float32, settings.device)
    arithmetic, count = ceilings.multiply_add(threads)
    loops = {
        "read": (ceilings.read(rows, threads), CEILING_ROWS * n * 4 / 1e9),
        "copy": (ceilings.copy(rows[0], rows[1], threads), 2 * n * 4 / 1e9),
        "arithmetic": (arithmetic, float(count)),
    }
    contenders = [
        Contender(name, "ceiling", call) for kind, _ in loops.values() for name, call in kind.items()
    ]
    clock = kernel_timing.clock(settings.device, threads, settings.rounds)
    times = kernel_timing.time_rounds(contenders, clock, settings.rounds, on_round=on_round)
    medians = times.medians()
    rates = {
        kind: max((amount / medians[name] for name in calls), default=None)
        for kind, (calls, amount) in loops.items()
    }
    return {
        "threads": threads if settings.device == "cpu" else None,
        "elements": n,
        "rows": CEILING_ROWS,
        "read_gb_per_second": rates["read"],
        "copy_gb_per_second": rates["copy"],
        "fp64_multiply_adds_per_second": rates["arithmetic"],
        "median_seconds": medians,
        "spread": {
            name: max(seconds) / min(seconds) for name, seconds in times.seconds.items() if len(seconds) > 1
        },
    }


def timed_records(
    settings: Settings, ceilings: Ceilings, bar: tqdm[Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Section and record of everything that is timed on rows, and the errors."""
    for dtype in settings.dtypes:
        element = getattr(torch, dtype).itemsize
        for size in settings.sizes:
            n = 2**size
            rows = kernel_contenders.make_rows(
                settings.rows[-1], n, getattr(torch, dtype), settings.device, stagger=settings.stagger
            )
            for threads in settings.thread_counts:
                blas = kernel_contenders.set_threads(threads)
                for m in settings.rows:
                    facts = {
                        "dtype": dtype,
                        "threads": threads if settings.device == "cpu" else None,
                        "rows": m,
                        "elements": n,
                    }
                    bar.set_description(f"{dtype} 2^{size} x {m}, {threads} threads")
                    for section, records in sections(
                        settings, ceilings, rows[:m], threads, blas, element, bar.update
                    ):
                        yield from ((section, {**facts, **record}) for record in records)
            del rows
        kernel_contenders.set_threads(settings.thread_counts[-1])
        for m in settings.rows:
            bar.set_description(f"errors of {m} x {dtype}")
            found = kernel_accuracy.gram_errors(
                m, settings.largest, getattr(torch, dtype), settings.device, with_numpy=True
            )
            facts = {"dtype": dtype, "rows": m, "elements": settings.largest}
            yield from (("accuracy", {**facts, **record}) for record in found)
            bar.update()


def sections(
    settings: Settings,
    ceilings: Ceilings,
    rows: list[Tensor],
    threads: int,
    blas: bool,
    element: int,
    on_round: Callable[[], Any],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The three sections of one configuration."""
    m, n, rounds = len(rows), rows[0].numel(), settings.rounds
    clock = kernel_timing.clock(settings.device, threads, rounds)
    contenders = kernel_contenders.gram(rows, threads, ceilings, blas)
    times = kernel_timing.time_rounds(contenders, clock, rounds, on_round=on_round)
    arithmetic = ceilings.multiply_add(threads)[1]
    needed = kernel_timing.multiply_adds(m, n)
    moved = kernel_timing.gram_bytes(m, n, element)
    yield "gram", kernel_timing.figures(contenders, times, moved, needed, arithmetic)

    restore = kernel_contenders.restorer(rows[-1])
    contenders = kernel_contenders.combine(rows, threads, ceilings)
    times = kernel_timing.time_rounds(contenders, clock, rounds, restore, on_round)
    moved = kernel_timing.combine_bytes(m, n, element)
    yield "combine", kernel_timing.figures(contenders, times, moved)

    contenders = kernel_contenders.step(rows)
    times = kernel_timing.time_rounds(contenders, clock, rounds, restore, on_round)
    moved = kernel_timing.step_bytes(m, n, element)
    yield "step", kernel_timing.figures(contenders, times, moved)
    restore()
    check_step(rows, contenders[0])
    restore()


def check_step(rows: list[Tensor], ours: Contender) -> None:
    """Check what the timed call writes: it skips rows of weight zero, so wrong weights could look fast.

    Raises:
        RuntimeError: the timed call does not write the combination.
    """
    weights = ops.min_norm(ops.gramian(rows))
    part = torch.stack([row[:CHECKED].double() for row in rows])
    ours.run()
    # A rounding to the rows' type, and one in fp32 for every row.
    bound = (1 + len(rows)) * torch.finfo(rows[-1].dtype).eps * float(part.abs().max())
    wrong = float((rows[-1][:CHECKED].double() - weights @ part).abs().max())
    if not wrong <= bound:
        raise RuntimeError(f"whole step: found an element {wrong:g} off, accepted: {bound:g}")
