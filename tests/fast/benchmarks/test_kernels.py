"""The kernels' benchmark: its arithmetic on hand-made times."""

from __future__ import annotations

import importlib
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
# A folder of scripts: its modules find each other there, and only there.
sys.path.insert(0, str(BENCHMARKS))
accuracy, contenders, qp, run, timing, kernels = (
    importlib.import_module(name)
    for name in (
        *("kernel_accuracy", "kernel_contenders", "kernel_qp"),
        *("kernel_run", "kernel_timing", "kernels"),
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
