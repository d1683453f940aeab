"""What was compiled, and that it speaks clearly where there is no GPU."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

from gapo_mega import ops
from gapo_mega.ops import _native

needs_no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def test_info():
    info = ops.info()
    assert set(info) == {"isa", "has_cuda", "cuda_archs", "threads"}
    assert info["isa"] in _native.instruction_sets()
    assert info["threads"] == torch.get_num_threads()
    assert bool(info["cuda_archs"]) == info["has_cuda"]


def test_cuda_is_built_where_nvcc_is():
    if os.environ.get("GAPO_CUDA") == "OFF" or not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH, or GAPO_CUDA=OFF")
    info = ops.info()
    assert info["has_cuda"]
    assert {"sm_80", "sm_90"} <= set(info["cuda_archs"])


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="reads Linux's /proc/cpuinfo")
def test_instruction_sets_are_the_processors():
    with open("/proc/cpuinfo") as file:
        flags = file.read().split()
    expected = (
        "avx512" if "avx512f" in flags else "avx2" if {"avx2", "fma", "f16c"} <= set(flags) else "baseline"
    )
    assert _native.instruction_sets()[0] == expected


@needs_no_device
@pytest.mark.skipif(not _native.has_cuda, reason="built without CUDA")
def test_launchers_say_that_there_is_no_device():
    plan = _native.cuda_plan([10], None)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        _native.cuda_probe(0)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        _native.cuda_workspace_size(2, 0)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        _native.cuda_gramian([0], [10], [0], [], None, plan, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        _native.cuda_combine([0], [10], [0], 0, [0], 0, 0, 0)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        _native.cuda_min_norm(0, 2, False, 0, 0, 0, 0)


@pytest.mark.skipif(not _native.has_cuda, reason="built without CUDA")
def test_device_plan_covers_every_segment_once():
    chunk = 4096  # kChunk in csrc/cuda/layout.h
    lengths = [10, 0, 3 * chunk, 5]
    segments = [(2, 12), (chunk, 3 * chunk + 13)]
    plan = _native.cuda_plan(lengths, np.array(segments))
    runs = [tuple(plan.table[i : i + 3]) for i in range(0, len(plan.table), 3)]
    # begin and end within the piece, and the first chunk of the run
    assert runs == [(2, 10, 0), (0, 2, 1), (chunk - 10, 3 * chunk, 2), (0, 3, 5)]
    assert _native.cuda_plan([0], None).table == []
