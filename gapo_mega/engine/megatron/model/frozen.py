"""Models that are only asked: reference and score models, on the device or in host memory between uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from gapo_mega.engine.megatron.runtime.cpu import device


class FrozenModel:
    """A model without gradients. ``with frozen.on_device() as model`` to run it.

    Args:
        model: on this rank's device.
        offload: keep the weights in host memory between uses. They do not change, so only the way to the
            device is ever taken: the host's copy, pinned where there is a GPU, is made once. Without a GPU
            the two are the same memory and nothing happens.
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
        """The model, its weights on the device until the block ends."""
        for tensor, held in self._host:
            tensor.data = held.to(device(), non_blocking=True)
        try:
            yield self.model
        finally:
            self._leave()

    def _leave(self) -> None:
        for tensor, held in self._host:
            tensor.data = held
