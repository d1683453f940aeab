"""Megatron's imports without a compiler that only GPUs have a use for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from unittest import mock

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def decide() -> None:
    """Let Megatron's fused functions run as they are written where torch is built for CPUs.

    Megatron hands some 40 functions to ``torch.compile`` as it is imported. That alone loads dynamo and
    inductor, a quarter of the CPU time that a process takes to start; on CPUs this package calls none of them
    in a loop that would repay it. Must come before Megatron's first import; later it changes nothing.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    with mock.patch("torch.compile", _as_written):
        import megatron.core.jit  # noqa: F401


def _as_written(function: Function) -> Function:
    return function
