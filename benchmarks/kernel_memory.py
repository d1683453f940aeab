"""Peak memory that an operation needs on top of its rows, measured in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WARM_UP_ELEMENTS = 1 << 12
SAMPLE_SECONDS = 0.001
# With these, malloc returns every larger block when it is freed, and the next contender asks for it again.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(device: str, dtype: str, rows: int, n: int, threads: int) -> list[dict[str, Any]]:
    """Records of ``section``, ``contender`` and ``extra_bytes`` (or ``failed``).

    Raises:
        RuntimeError: the process ended without an answer.
    """
    request = json.dumps({"device": device, "dtype": dtype, "rows": rows, "n": n, "threads": threads})
    code = "import kernel_memory; kernel_memory.answer()"
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], input=request, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"memory of {rows} rows of {n} x {dtype}: process ended with {done.returncode}: {reason}"
        )
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return records


def answer() -> None:
    """Runs in the other process: reads a request on standard input, prints the records."""
    import torch
    from kernel_contenders import combine, gram, make_rows, restorer, set_threads, step

    request = json.load(sys.stdin)
    device, m, dtype = request["device"], request["rows"], getattr(torch, request["dtype"])
    blas = set_threads(request["threads"])
    builders: dict[str, Callable[[Any], Any]] = {
        "gram": lambda rows: gram(rows, request["threads"], None, blas),
        "combine": lambda rows: combine(rows, request["threads"], None),
        "step": step,
    }
    rows = make_rows(m, request["n"], dtype, device)
    small = make_rows(m, WARM_UP_ELEMENTS, dtype, device)
    restore = restorer(rows[-1])
    records = []
    for section, build in builders.items():
        warm_up = {contender.name: contender.run for contender in build(small)}
        if device == "cuda":  # ours starts cold: what it keeps between calls counts
            torch.stack(small) @ torch.stack(small).T
        for contender in build(rows):
            record = {"section": section, "contender": contender.name, "kind": contender.kind}
            try:
                if device != "cuda" or contender.kind != "ours":
                    warm_up[contender.name]()
                peak = peak_cuda if device == "cuda" else peak_cpu
                record["extra_bytes"] = peak(contender.run) + contender.setup_bytes
            except Exception as error:
                if contender.kind == "ours":
                    raise
                record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            restore()  # as in the timing, each finds the same rows
            records.append(record)
    print(json.dumps(records))


def peak_cuda(run: Callable[[], Any]) -> int:
    """Peak by torch's allocator, which ours takes its memory from too."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def peak_cpu(run: Callable[[], Any]) -> int:
    """Peak resident memory: the kernel's record where it can be reset (Linux), else by sampling."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _sampled(run)
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


def _sampled(run: Callable[[], Any]) -> int:
    """Peak by sampling, which misses what lasts less than a millisecond."""
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = before

    def look() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(SAMPLE_SECONDS)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        result = run()
        peak = max(peak, process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    del result
    return peak - before
