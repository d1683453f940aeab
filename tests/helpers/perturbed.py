"""Models that differ a little."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def perturbed(source: Path, target: Path, seed: int, size: float = 0.3) -> Path:
    """A copy of a Hugging Face directory, with noise of ``size`` standard deviations on every matrix."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(seed)
    path = target / "model.safetensors"
    tensors = {
        name: value + size * value.std() * torch.randn(value.shape, generator=generator)
        if value.ndim == 2
        else value
        for name, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return target
