"""Tensors that depend on shapes and options alone, made once and kept on a device for good."""

from __future__ import annotations

import torch
from torch import Tensor


def resident(host: Tensor, device: torch.device) -> Tensor:
    """A copy of ``host`` on ``device`` that is complete on return, for every stream and every CUDA graph.

    So it can be cached: a tensor that a kernel makes is complete only for the stream of that kernel, and one
    from within a capture belongs to that graph's memory.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    assert host.device.type == "cpu"
    if device.type == "cuda":
        _refuse_in_capture(device)
    with torch.inference_mode(False):
        return host.to(device, copy=True)


def _refuse_in_capture(device: torch.device) -> None:
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "CUDA graph: found the first call with these shapes and options in the capture, accepted: "
                "one before it, which brings the constants to the device"
            )
