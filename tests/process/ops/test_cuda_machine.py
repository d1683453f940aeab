"""What the extension says of devices, drivers and architectures, with a machine that is made up."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

from gapo_mega.ops import kernels
from tests.helpers.cuda_emulation.build import compiler
from tests.helpers.cuda_emulation.extension import Emulated

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator uses Linux's memory and contexts"),
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="no C++ compiler"),
]

# Of cuda_runtime_api.h.
INVALID_DEVICE_FUNCTION, NO_KERNEL_IMAGE, UNSUPPORTED_PTX, ILLEGAL_ADDRESS = 98, 209, 222, 700
ARCHS = ["sm_80", "sm_90", "sm_100"]


def explained(emulated: Emulated, capability: str = "90") -> str:
    return kernels.explain(emulated.native.cuda_probe(0), ARCHS, "Some GPU", capability)


def test_nothing_stands_between(emulated: Emulated) -> None:
    assert explained(emulated) == ""
    emulated.machine(driver=14000)
    assert explained(emulated) == ""


def test_a_driver_of_an_older_cuda_is_named_with_the_way_out(emulated: Emulated) -> None:
    emulated.machine(driver=12040)
    assert explained(emulated) == (
        "compiled with CUDA 13.0 for sm_80, sm_90, sm_100; Some GPU is sm_90, and its driver supports CUDA "
        "12.4 (cudaError: CUDA driver version is insufficient for CUDA runtime version); install it again "
        "with the nvcc of CUDA 12: CUDACXX=/path/to/nvcc GAPO_CUDA=ON"
    )


@pytest.mark.parametrize("error", [INVALID_DEVICE_FUNCTION, NO_KERNEL_IMAGE, UNSUPPORTED_PTX])
def test_a_device_that_nothing_was_compiled_for_is_named_with_the_way_out(
    emulated: Emulated, error: int
) -> None:
    emulated.machine(load_error=error)
    said = explained(emulated, "70")
    assert "for sm_80, sm_90, sm_100; Some GPU is sm_70" in said
    assert said.endswith("GAPO_CUDA=ON GAPO_CUDA_ARCHS=70")
    emulated.machine()
    assert explained(emulated) == ""  # and the error is no later call's


def test_what_has_failed_is_not_taken_for_another_architecture(emulated: Emulated) -> None:
    emulated.machine(load_error=ILLEGAL_ADDRESS)
    with pytest.raises(RuntimeError, match=r"^CUDA device: cudaError: unrecognized error code$"):
        emulated.native.cuda_probe(0)


@pytest.mark.parametrize("driver", [0, 13000])
def test_no_device_is_an_error(emulated: Emulated, driver: int) -> None:
    emulated.machine(devices=0, driver=driver)
    with pytest.raises(RuntimeError, match="no CUDA device: "):
        emulated.native.cuda_probe(0)


def test_the_device_is_neither_changed_nor_guessed(emulated: Emulated) -> None:
    """To switch devices here, and back, would make a context on a device that nobody uses."""
    emulated.machine(devices=2)
    gram = torch.eye(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^CUDA device 1: the current one is 0$"):
        emulated.native.cuda_min_norm(gram.data_ptr(), 2, False, 0, 0, 1, 0)
    with pytest.raises(RuntimeError, match=r"^CUDA device 1: the current one is 0$"):
        emulated.native.cuda_workspace_size(2, 1)
    with pytest.raises(RuntimeError, match=r"^no CUDA device 2: found 2$"):
        emulated.native.cuda_probe(2)
    emulated.min_norm(gram)


def test_other_threads_of_python_run_meanwhile(emulated: Emulated) -> None:
    before = emulated.calls_with_lock()
    rows = [[emulated.memory.place(torch.ones(100))] for _ in range(2)]
    emulated.gramian(rows)
    emulated.combine([emulated.memory.place(torch.ones(100), written=True)], rows, [1.0, 2.0])
    emulated.min_norm(torch.eye(2, dtype=torch.float64))
    emulated.native.cuda_probe(0)
    assert emulated.calls_with_lock() == before
