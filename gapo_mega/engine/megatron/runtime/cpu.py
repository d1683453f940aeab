"""Runs Megatron-core's CUDA-only lines on the CPU.

Megatron-core names the device "cuda" literally in its schedules, optimizers, gradient clipping and
random-number tracker. Without a GPU the same code works once those names mean the CPU. They do so only within
``megatron_device()``, which patches nothing at import and restores everything on exit. There the data ranks
also exchange shards by ``collectives.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from gapo_mega.engine.megatron.runtime import collectives
from gapo_mega.engine.megatron.runtime.releases import errors_only

_CPU = torch.device("cpu")
_CUDA_TYPE_PREFIX = "torch.cuda."


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects device arguments, ``Tensor.cuda`` and the ``torch.cuda.*Tensor`` type names to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron compares with "torch.cuda.FloatTensor" to find the dtype.
            return func(args[0]).replace("torch.", _CUDA_TYPE_PREFIX, 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


@contextmanager
def _megatron_rng_on_cpu() -> Iterator[None]:
    """Run Megatron's RNG tracker on the CPU generator, without its warning that this generator advanced."""
    from megatron.core.tensor_parallel import random

    with (
        errors_only(random.__name__),
        patch.object(random, "_get_cuda_rng_state", _get_rng_state),
        patch.object(random, "_set_cuda_rng_state", _set_rng_state),
        patch.object(torch.cuda, "get_rng_state", _get_rng_state),
        patch.object(torch.cuda, "manual_seed", torch.manual_seed),
    ):
        yield


def _re_entering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` within the mode, which autograd's backward has left when it recomputes."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _CudaMeansCpu():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def _cpu_mode() -> Iterator[None]:
    # Imported here so that this module does not import Megatron.
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.fusions import fused_softmax

    causal = _re_entering(fused_softmax.get_default_causal_mask)
    window = _re_entering(fused_softmax.get_sliding_window_causal_mask)
    with (
        patch.object(fused_softmax, "get_default_causal_mask", causal),
        patch.object(fused_softmax, "get_sliding_window_causal_mask", window),
        patch.object(torch.cuda, "current_device", lambda: _CPU),
        patch.object(torch.cuda, "synchronize", lambda device=None: None),
        # Gradient reduction asks for it, and waits for it only where CUDA graphs were captured.
        patch.object(torch.cuda, "current_stream", torch.cpu.current_stream),
        # Several instances of the distributed optimizer make one, for reductions that overlap.
        patch.object(torch.cuda, "Stream", lambda device=None: torch.cpu.current_stream()),
        patch.object(buffers, "dist_reduce_scatter_func", collectives.reduce_scatter_tensor),
        patch.object(buffers, "dist_all_gather_func", collectives.all_gather_into_tensor),
        _megatron_rng_on_cpu(),
        _CudaMeansCpu(),
    ):
        yield


@contextmanager
def megatron_device() -> Iterator[None]:
    """The context for every call into Megatron: it makes CUDA names mean the CPU if there is no GPU."""
    if torch.cuda.is_available():
        yield
    else:
        with _cpu_mode():
            yield


def device() -> torch.device:
    """The device of parameters and gradients."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
