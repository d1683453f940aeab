"""The processes of benchmarks/peers.py: each builds one contender and does one task with it.

They are forked from a server that has imported everything and computed nothing, so that starting one takes
no time, and none finds memory or caches of another.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import platform
import warnings
from dataclasses import asdict
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import kernel_memory
import kernel_run
import peer_hf
import peer_inputs
import peer_ours
import psutil
import torch
from peer_contender import Contender
from peer_entries import TORCHJD_KINDS
from peer_jobs import Job, Order, Task

from gapo_mega import ops
from gapo_mega.aggregation import registry as aggregation
from gapo_mega.measuring.allocation import measure_allocations
from gapo_mega.types import Experience

# How torch, vmap and TorchJD say that they do not support a model. Anything else ends the benchmark.
REFUSALS = (RuntimeError, ValueError, TypeError)

STEPS = 2  # of a memory measurement
PACKAGES = (
    "torch",
    "transformers",
    "torchjd",
    "megatron-core",
    "numpy",
    "qpsolvers",
    "quadprog",
    "gapo-mega",
)
# glibc's mallopt: every block of 64 KiB or more goes back to the system when it is freed.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def load_lazy_imports() -> None:
    """Import what contenders would import late, before anything is measured."""
    aggregation.methods()
    if importlib.util.find_spec("torchjd") is not None:
        import torchjd.autogram
        import torchjd.autojac  # noqa: F401


load_lazy_imports()


def build(job: Job) -> Contender:
    """The job's contender: model, optimizer and batch."""
    batch = load_batch(job.batch, job.entry.objectives(job.objectives))
    objectives = job.entry.objectives(job.objectives)
    if job.entry.stack == "hf":
        return peer_hf.build(job.entry, job.source, batch, objectives, job.attention)
    return peer_ours.build(job.entry, job.source, batch, objectives, job.microbatches)


def load_batch(file: str, objectives: int) -> Experience:
    """The batch with its first ``objectives`` objectives."""
    stored = {k: v for k, v in torch.load(file, weights_only=True).items() if v is not None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Experience(
        **{k: (v[:objectives] if "_MB" in k else v).contiguous().to(device) for k, v in stored.items()}
    )


# --- tasks ------------------------------------------------------------------------------------------


def work(connection: Connection, job: Job, task: Task) -> None:
    """What the process does: it sends one answer, for ``time`` one per "step" that it receives.

    A peer that refuses answers ``{"failed": ...}``; errors of others end the process.
    """
    torch.set_num_threads(job.threads)
    warnings.simplefilter("ignore")  # `look` keeps what they say
    if job.entry.kind not in TORCHJD_KINDS:
        do(connection, job, task)
        return
    try:
        do(connection, job, task)
    except REFUSALS as error:
        kind = type(error)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        connection.send({"failed": f"{name}: {error}"})


def do(connection: Connection, job: Job, task: Task) -> None:
    """Do the task and send its answer."""
    if task == "time":
        keep_time(connection, job)
    else:
        connection.send({"look": look, "allocated": allocated, "resident": resident}[task](job))


def look(job: Job) -> dict[str, Any]:
    """What ``Contender.look`` gives for the job's scopes."""
    return build(job).look(list(job.scopes))


def allocated(job: Job) -> dict[str, int]:
    """Bytes by torch's allocator: those held when all is built, and the most in the steps after."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with measure_allocations(device) as building:
        contender = build(job)
    with measure_allocations(device) as stepping:
        take_steps(contender)
    return {"built_bytes": building.net_bytes, "peak_bytes": building.net_bytes + stepping.peak_bytes}


def resident(job: Job) -> dict[str, int]:
    """Bytes by the kernel's count, above those of the process when it began.

    Those held when all is built, the most in the steps after, and those held at their end.
    """
    return_freed_memory()
    process = psutil.Process()
    start = process.memory_info().rss
    contender = build(job)
    gc.collect()
    built = process.memory_info().rss - start
    peak = built + kernel_memory.peak_cpu(lambda: take_steps(contender))
    return {
        "built_bytes": built,
        "peak_bytes": peak,
        "idle_bytes": process.memory_info().rss - start,
    }


def take_steps(contender: Contender) -> None:
    """Take the steps of a memory measurement; the first one creates the optimizer's state."""
    for _ in range(STEPS):
        contender.step()


def return_freed_memory() -> None:
    """Make glibc's malloc return freed blocks, so that the kernel counts only memory in use."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for parameter in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            library.mallopt(parameter, 1 << 16)


def keep_time(connection: Connection, job: Job) -> None:
    """A warm-up step, then one for every "step" received, until the other side closes the connection."""
    contender = build(job)
    contender.step()
    connection.send("ready")
    try:
        while connection.recv() == "step":
            connection.send(contender.step())
    except EOFError:
        return  # the other side is done


# --- preparation ------------------------------------------------------------------------------------


def prepare(connection: Connection, order: Order) -> None:
    """Write model and batch; answer with their places and with facts about them and the machine."""
    torch.set_num_threads(order.threads)
    folder = Path(order.folder)
    source = order.model
    if source is None:
        source = str(folder / "model")
        peer_inputs.write_random_model(Path(source), order.size, order.length)
    model = peer_inputs.load_model(source, order.attention)
    batch = peer_inputs.make_batch(model, order.sequences, order.length, order.objectives)
    file = folder / "batch.pt"
    torch.save(asdict(batch), file)
    facts = peer_inputs.describe(model, batch)
    facts["source"] = "random" if order.model is None else Path(order.model).name
    connection.send({"source": source, "batch": str(file), "model": facts, "machine": machine_facts()})


def machine_facts() -> dict[str, Any]:
    """What the figures depend on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else kernel_run.cpu_model(),
        "cpu": kernel_run.cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "isa": ops.info()["isa"],
        "versions": versions,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "busy_before": kernel_run.busy(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
