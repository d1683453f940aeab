"""What is said where the compiled kernels do not run; the process tests of CUDA machines have the reasons."""

from __future__ import annotations

import logging

import pytest
import torch

from gapo_mega.ops import _native, cuda, fault_of, kernels

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def built_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "has_cuda", False)
    kernels._warn.cache_clear()


@pytest.mark.usefixtures("built_without_nvcc")
def test_one_warning_a_process_names_the_reason_and_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [kernels.usable(DEVICE) for _ in range(3)] == [False, False, False]
    (record,) = caplog.records
    said = record.getMessage()
    assert "slower torch operations combine the gradients on the GPU" in said
    assert said.endswith(fault_of(DEVICE)) and "install it again with nvcc on PATH and GAPO_CUDA=ON" in said


@pytest.mark.usefixtures("built_without_nvcc")
def test_what_must_not_wait_for_the_device_has_no_other_way() -> None:
    with pytest.raises(RuntimeError, match=r"^no CUDA back end: the extension was built without nvcc"):
        cuda.require_kernels(DEVICE)
