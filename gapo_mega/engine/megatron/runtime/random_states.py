"""The states of every random-number generator of this process, Megatron's included."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def current() -> dict[str, Any]:
    """Those of now, by generator; copies, which can be pickled."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def restore(states: dict[str, Any]) -> None:
    """Set what ``current`` gave; a device that is not here is left out."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
