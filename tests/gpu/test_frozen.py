"""Frozen models that stay in host memory between uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gapo_mega.engine.megatron.model.frozen import FrozenModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_offloaded_weights_come_for_a_use_and_go_after_it() -> None:
    model = nn.Linear(1024, 1024, device="cuda")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    inputs = torch.randn(3, 1024, device="cuda")
    expected = model(inputs).detach()
    resident = torch.cuda.memory_allocated()
    frozen = FrozenModel(model, offload=True)
    assert resident - torch.cuda.memory_allocated() >= size
    for _ in range(2):
        with frozen.on_device() as here, torch.no_grad():
            assert torch.equal(here(inputs), expected)
        assert all(p.device.type == "cpu" and p.is_pinned() for p in model.parameters())
        assert resident - torch.cuda.memory_allocated() >= size


def test_without_offloading_the_model_stays() -> None:
    model = nn.Linear(8, 8, device="cuda")
    with FrozenModel(model, offload=False).on_device() as here:
        assert here is model
    assert all(p.is_cuda and not p.requires_grad for p in model.parameters())
