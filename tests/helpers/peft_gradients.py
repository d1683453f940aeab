"""Gradients of an adapter's parameters by PEFT and autograd in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gapo_mega.types import Experience
from tests.helpers.peft_models import peft_model
from tests.helpers.policy_gradients import Reference


def adapter_rows(base: Path, adapter: Path, batch: Experience) -> tuple[list[str], Tensor]:
    """Names of the adapter's parameters, and their gradients for every objective, flattened [M, N]."""
    model = peft_model(base, adapter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = Reference.losses_from(model(batch.tokens_BT).logits, batch)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*trained.values()], retain_graph=True)])
        for loss in losses
    ]
    names = [name.replace(".default", "") for name in trained for _ in range(trained[name].numel())]
    return names, torch.stack(rows)
