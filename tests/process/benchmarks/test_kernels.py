"""The kernels' benchmark: its arithmetic on hand-made times, its measuring devices, and a tiny run."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
# A folder of scripts: its modules find each other there, and only there.
sys.path.insert(0, str(BENCHMARKS))
ceilings, accuracy, contenders, memory, qp, report, run, timing, kernels = (
    importlib.import_module(name)
    for name in (
        *("ceilings", "kernel_accuracy", "kernel_contenders", "kernel_memory", "kernel_qp"),
        *("kernel_report", "kernel_run", "kernel_timing", "kernels"),
    )
)


def contender(name: str, kind: str, function=lambda: None):
    return timing.Contender(name, kind, function)


def test_figures_follow_from_times():
    entrants = [
        contender("ours", "ours"),
        contender("slow loop", "ceiling"),
        contender("fast loop", "ceiling"),
        contender("sums", "arithmetic"),
        contender("peer", "peer"),
        contender("broken", "peer"),
    ]
    times = timing.Times(
        {
            "ours": [0.5, 9.0, 0.4],
            "slow loop": [1.0, 1.0, 1.0],
            "fast loop": [0.25, 0.2, 8.0],
            "sums": [0.1, 0.1, 0.1],
            "peer": [2.0, 1.0, 1.5],
        },
        {"broken": "TypeError: no"},
    )
    # 4 GB; 6e9 multiply-adds at 2e9 in 0.1 s are 0.3 s, longer than the fast loop's 0.25 s.
    records = {r["contender"]: r for r in timing.figures(entrants, times, 4 * 10**9, 6 * 10**9, 2 * 10**9)}
    assert records["ours"]["seconds"] == 0.5
    assert records["ours"]["round_seconds"] == [0.5, 9.0, 0.4]
    assert records["ours"]["gb_per_second"] == pytest.approx(8.0)
    assert records["ours"]["fraction_of_ceiling"] == pytest.approx(0.5)
    assert records["ours"]["fraction_of_roofline"] == pytest.approx(0.6)
    assert records["ours"]["times_ours"] == 1.0
    assert records["fast loop"]["fraction_of_ceiling"] == 1.0
    assert records["peer"]["times_ours"] == pytest.approx(3.0)
    assert records["peer"]["fraction_of_ceiling"] == pytest.approx(0.25 / 1.5)
    assert records["sums"]["multiply_adds_per_second"] == pytest.approx(2e10)
    assert records["broken"] == {"contender": "broken", "kind": "peer", "failed": "TypeError: no"}
    # Where memory is the slower of the two, it is the roof.
    records = {r["contender"]: r for r in timing.figures(entrants, times, 4 * 10**9, 10**9, 2 * 10**9)}
    assert records["ours"]["fraction_of_roofline"] == pytest.approx(0.5)


def test_without_ceilings_there_is_no_fraction():
    times = timing.Times({"ours": [1.0], "peer": [2.0]})
    ours, peer = timing.figures([contender("ours", "ours"), contender("peer", "peer")], times, 10**9)
    assert "fraction_of_ceiling" not in ours and "fraction_of_roofline" not in ours
    assert peer["times_ours"] == 2.0


def test_bytes_and_multiply_adds():
    assert timing.gram_bytes(3, 10, 4) == 120
    assert timing.combine_bytes(3, 10, 2) == 80
    assert timing.step_bytes(3, 10, 2) == 140
    assert timing.multiply_adds(4, 10) == 100


def test_rounds_are_interleaved_and_a_failing_peer_drops_out():
    order = []

    class Clock:
        def calls(self, seconds):
            return 2

        def turn(self, function, prepare, calls):
            prepare()
            function()
            return [1.0] * calls

    def fail():
        raise TypeError("not for this type\nmore")

    entrants = [
        contender("ours", "ours", lambda: order.append("ours")),
        contender("bad", "peer", fail),
        contender("good", "peer", lambda: order.append("good")),
    ]
    times = timing.time_rounds(entrants, Clock(), 3, lambda: order.append("prepared"))
    assert (
        order
        == ["prepared", "ours", "prepared", "prepared", "good"]
        + [*("prepared", "ours", "prepared", "good")] * 3
    )
    assert times.failed == {"bad": "TypeError: not for this type"}
    assert times.medians() == {"ours": 1.0, "good": 1.0}
    with pytest.raises(TypeError):
        timing.time_rounds([contender("ours", "ours", fail)], Clock(), 1)


def test_the_clock_times_as_many_calls_as_it_says():
    for calls, expected in ((1, 1), (4, 5)):  # short calls: one before that is not timed
        made = []
        seconds = timing.CpuClock(1).turn(lambda made=made: made.append(1), timing.nothing, calls)
        assert len(seconds) == calls and len(made) == expected
    assert timing.CpuClock(1).calls(10.0) == 1
    assert timing.CpuClock(1).calls(1e-9) == timing.MOST_CALLS
    assert timing.CudaClock(7).calls(10.0) * 7 >= timing.CUDA_CALLS


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


def test_errors_of_gram_matrices():
    rows = [torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 3.0, 4.0])]
    gram = accuracy.reference_gram(rows)
    assert gram.tolist() == [[9.0, 14.0], [14.0, 25.0]]
    assert accuracy.error(gram + torch.tensor([[0.0, 3.0], [3.0, 0.0]]), gram) == pytest.approx(0.2)
    for n in (5000, accuracy.BLOCK + 4097):  # with and without whole parts and blocks
        rows = contenders.make_rows(3, n, torch.float32, "cpu")
        whole = torch.stack(rows).double()
        assert accuracy.error(accuracy.reference_gram(rows), whole @ whole.T) < 1e-13
    found = {r["contender"]: r for r in accuracy.gram_errors(4, 1 << 14, torch.float32, "cpu", True)}
    # Ours in fp64, the others in fp32 with its 6e-8 an operation.
    assert max(found["ours"]["error"], found["ours"]["error_hard"]) < 1e-6
    assert set(found) == {contenders.OURS, contenders.STACK, contenders.DOTS, contenders.NUMPY}
    assert all(record["error_hard"] < 1e-2 for record in found.values())


def test_residual_of_weights():
    gram = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert qp.residual(gram, torch.tensor([0.75, 0.25], dtype=torch.float64)) == 0.0
    # Gw = (1/2, 3/2), w'Gw = 1, the summands of either row: 1/2 + 1 and 3/2 + 1.
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert qp.residual(gram, half) == pytest.approx(float(Fraction(1, 3)))
    for off in ([1.5, -0.5], [0.5, 0.4], [float("nan"), 1.0]):
        assert qp.residual(gram, torch.tensor(off, dtype=torch.float64)) == float("inf")


def test_operations_in_place_find_the_same_rows_again():
    rows = contenders.make_rows(3, 1 << 10, torch.bfloat16, "cpu")
    before = rows[-1].clone()
    restore = contenders.restorer(rows[-1])
    for entrant in contenders.combine(rows, 1, None):
        entrant.run()
        assert not torch.equal(rows[-1], before)
        restore()
        assert torch.equal(rows[-1], before)


def test_the_step_that_is_timed_is_checked():
    rows = contenders.make_rows(3, 1 << 10, torch.float32, "cpu")
    restore = contenders.restorer(rows[-1])
    ours = contenders.step(rows)[0]
    run.check_step(rows, ours)
    restore()
    with pytest.raises(RuntimeError, match="whole step"):
        run.check_step(rows, contender("ours", "ours"))


@pytest.mark.parametrize("text", ["", "2,x", "0,4", "4,17"])
def test_wrong_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r"^rows: found .* accepted: numbers from 1 to 16"):
        kernels.parse_numbers("rows", text, 1, 16)
    assert kernels.parse_numbers("rows", "8, 2,2", 1, 16) == [2, 8]


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="dtypes: found 'float64'"):
        kernels.parse_choices("dtypes", "float64", ("float32", "bfloat16"))
    with pytest.raises(ValueError, match="device: found 'tpu'"):
        run.choose_device("tpu")
    with pytest.raises(ValueError, match="sizes: found 40 with 2 rows"):
        run.check_memory(run.Settings("cpu", [1], [2], ["float32"], [40], 1))


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
