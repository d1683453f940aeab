"""Models that never train: reference and score models, kept on the device or offloaded to host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from gapo_mega.engine.megatron.runtime.cpu import device


class FrozenModel:
    """A model without gradients; run it within ``with frozen.on_device() as model``.

    Args:
        model: on this rank's device.
        offload: keep the weights in pinned host memory between uses. They never change, so every use copies
            to the device and nothing copies back. Without a GPU this does nothing.
    """

    def __init__(self, model: nn.Module, offload: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        self._host: list[tuple[Tensor, Tensor]] = []
        if offload and device().type == "cuda":
            tensors = chain(model.parameters(), model.buffers())
            self._host = [(tensor, tensor.detach().cpu().pin_memory()) for tensor in tensors]
            self._leave()

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The model, with its weights on the device until the block ends."""
        for tensor, held in self._host:
            tensor.data = held.to(device(), non_blocking=True)
        try:
            yield self.model
        finally:
            self._leave()

    def _leave(self) -> None:
        for tensor, held in self._host:
            tensor.data = held
