"""The peak of a device by measurement."""

from __future__ import annotations

from gapo_mega.measuring import peak


def test_measured_peak_is_a_rate() -> None:
    """Wide bounds around any CPU: a time, a count or a rate in Gflop/s would fall outside."""
    assert 1e8 < peak.measure_gemm_peak(size=256, seconds=0.05) < 1e15
