"""The kernels' benchmark: its measuring devices, and a tiny run."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
# A folder of scripts: its modules find each other there, and only there.
sys.path.insert(0, str(BENCHMARKS))
ceilings, contenders, memory, qp, report = (
    importlib.import_module(name)
    for name in ("ceilings", "kernel_contenders", "kernel_memory", "kernel_qp", "kernel_report")
)


@pytest.mark.parametrize("m", [1, 3, 16])
def test_ceiling_loops_touch_every_element(m):
    loops = ceilings.CpuCeilings()
    for threads in (1, 2):
        rows = [row.round() for row in contenders.make_rows(m, 1 << 12, torch.float32, "cpu")]
        total = float(torch.stack(rows).sum())  # of small integers: exact in any order
        found = {name: read() for name, read in loops.read(rows, threads).items()}
        assert set(found.values()) == {total}
        for write in loops.combine(rows[-1], rows, threads).values():
            expected = torch.stack(rows).sum(dim=0)
            write()
            assert torch.equal(rows[-1], expected)
        for copy in loops.copy(rows[0], rows[-1], threads).values():
            rows[0].zero_()
            copy()
            assert torch.equal(rows[0], rows[-1])
    _, count = loops.multiply_add(2)
    assert count == 2 * loops.multiply_add(1)[1]


def test_a_compiler_that_fails_says_why(tmp_path, monkeypatch):
    source = tmp_path / "broken.cpp"
    source.write_text("#error nothing works\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="nothing works"):
        ceilings.compile_library(source, ceilings.compiler_command("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(RuntimeError, match="found no compiler 'no-such-compiler'"):
        ceilings.CpuCeilings()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
@pytest.mark.parametrize("peak", ["peak_cpu", "_sampled"])
def test_peak_memory_is_seen(peak):
    """In a process of its own, as they are used: one that has freed much grows by nothing."""
    size = 1 << 26
    code = f"""if True:
        import kernel_memory as memory, numpy as np
        peak = memory.{peak}
        print(peak(lambda: [np.ones({size}, dtype=np.int8) for _ in range(2)]), peak(lambda: None))
    """
    environment = {**os.environ, **memory.MALLOC, "PYTHONPATH": str(memory.HERE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two_arrays, nothing = map(int, done.stdout.split())
    assert 2 * size * 0.95 < two_arrays < 2 * size * 1.2
    assert nothing < size / 8


def test_tiny_run(tmp_path):
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Haswell"}
    options = ["--device", "cpu", "--sizes", "16", "--rounds", "1", "--rows", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernels.py"), *options, "--out", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kernels-cpu.json").read_text(encoding="utf-8"))
    assert (tmp_path / "kernels-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert set(result) == {
        *("machine", "settings", "torchjd", "ceilings", "qp"),
        *("memory", "accuracy", "gram", "combine", "step"),
    }
    machine = result["machine"]
    assert machine["removed_from_environment"] == "OPENBLAS_CORETYPE=Haswell"
    assert machine["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert machine["isa"] and machine["cpu"] and machine["date"]
    assert result["settings"]["sizes"] == [16]
    (ceiling,) = result["ceilings"]
    assert ceiling["read_gb_per_second"] > 0 and ceiling["copy_gb_per_second"] > 0
    for section, moved in (("gram", 2), ("combine", 3), ("step", 5)):
        for dtype, element in (("float32", 4), ("bfloat16", 2)):
            records = {r["contender"]: r for r in result[section] if r["dtype"] == dtype and "seconds" in r}
            ours = records["ours"]
            assert (ours["rows"], ours["elements"], ours["threads"]) == (2, 1 << 16, 1)
            seconds = {name: r["seconds"] for name, r in records.items()}
            loops = [seconds[name] for name, r in records.items() if r["kind"] == "ceiling"]
            gigabytes = moved * 2**16 * element / 1e9
            assert ours["gb_per_second"] == pytest.approx(gigabytes / seconds["ours"])
            assert bool(loops) == (section != "step")
            if loops:
                assert ours["fraction_of_ceiling"] == pytest.approx(min(loops) / seconds["ours"])
            for name, r in records.items():
                if r["kind"] == "peer":
                    assert r["times_ours"] == pytest.approx(seconds[name] / seconds["ours"])
    sections = {(r["section"], r["contender"]) for r in result["memory"] if "extra_bytes" in r}
    assert {(section, "ours") for section in ("gram", "combine", "step")} <= sections
    assert {r["contender"] for r in result["accuracy"]} >= {"ours", "torch stack", "torch.dot of pairs"}
    ours = [r for r in result["qp"] if r["contender"].startswith("ours")]
    assert len(ours) == 2 * len(qp.grams(2, 0)) and all(r["residual"] <= 1e-9 for r in ours)

    # The tables of the same figures, as they are on a machine without TorchJD.
    for section in ("qp", "memory", "step"):
        result[section] = [r for r in result[section] if not r["contender"].startswith("TorchJD")]
    console = Console(width=160, record=True, file=io.StringIO())
    report.print_tables({**result, "torchjd": False}, console)
    text = console.export_text()
    assert "torchjd is not installed: pip install" in text
    for heading in ("ceilings of this machine", "Gram matrix", "combination", "whole step", "KKT residual"):
        assert heading in text
        assert heading in done.stdout
