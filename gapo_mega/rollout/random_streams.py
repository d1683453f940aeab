"""Keeps what is asked in between from the random numbers that training draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """After the block the process's random-number generators are where they were before it.

    Those of Python, numpy and torch, the current GPU's too. Objectives of the user's own may draw from them;
    sampling does not, since its seeds are its own.
    """
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
