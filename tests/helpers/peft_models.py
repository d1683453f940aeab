"""Adapters made and read by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

RANK, ALPHA = 3, 5.0
SETTINGS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


def random_adapter(base: Path, target: Path, targets: Any = "all-linear", **fields: Any) -> Path:
    """An adapter whose A and B are both random, as PEFT stores it; ``fields``: PEFT's."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=targets,
            **{"r": RANK, "lora_alpha": ALPHA, **fields},
        ),
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(target)
    return target


def peft_model(base: Path, adapter: Path) -> PeftModel:
    """In float64, with the adapter's parameters trainable."""
    # The default for experts has no float64.
    model = AutoModelForCausalLM.from_pretrained(base, experts_implementation="eager").double()
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).double().eval()


@torch.no_grad()
def logits_of(base: Path, adapter: Path, tokens_BT: Tensor) -> Tensor:
    logits_BTV: Tensor = peft_model(base, adapter)(tokens_BT).logits
    return logits_BTV


def flat_adapter(base: Path, adapter: Path) -> Tensor:
    """An adapter's parameters as PEFT loads them, in the order of ``adapter_rows``."""
    trained = [p for p in peft_model(base, adapter).parameters() if p.requires_grad]
    return torch.cat([p.detach().flatten() for p in trained])
