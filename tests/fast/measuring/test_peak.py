"""Peaks of devices by name, and by measurement."""

from __future__ import annotations

import pytest

from gapo_mega.measuring import peak


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_known_peaks(name: str, tera: float) -> None:
    assert peak.known_peak_flops(name) == tera * 1e12


def test_unknown_peaks() -> None:
    assert peak.known_peak_flops("NVIDIA GeForce RTX 4090") is None
    assert peak.known_peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_measured_peak_is_a_rate() -> None:
    """Wide bounds around any CPU: a time, a count or a rate in Gflop/s would fall outside."""
    assert 1e8 < peak.measure_gemm_peak(size=256, seconds=0.05) < 1e15
