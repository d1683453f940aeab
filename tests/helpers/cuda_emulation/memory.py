"""Memory that shows when more of it is read or written than should be."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
# Bytes: start addresses are chosen against multiples of it. The widest vector of a kernel, 8 fp32 elements.
GRAIN = 32
PROT_NONE = 0


class GuardedMemory:
    """Copies of tensors, each between two pages that do not exist.

    The bytes from the first page to the copy, and the few from the copy to the last page, are ones: NaN in
    every floating-point type.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._copies: list[tuple[Tensor, int, int, Tensor | None]] = []

    def place(self, values: Tensor, shift: int = 0, *, written: bool = False) -> Tensor:
        """A copy that starts ``shift`` elements off a multiple of GRAIN bytes; ``written``: it may change."""
        size = values.numel() * values.element_size()
        inner = -(-(size + 2 * GRAIN) // PAGE) * PAGE
        buffer = mmap.mmap(-1, inner + 2 * PAGE)
        every = torch.frombuffer(buffer, dtype=torch.uint8)
        for page in (every.data_ptr(), every.data_ptr() + PAGE + inner):
            if self._libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        bytes_ = every[PAGE : PAGE + inner]
        bytes_.fill_(0xFF)
        start = inner - size
        start -= (start - shift * values.element_size()) % GRAIN
        copy = bytes_[start : start + size].view(values.dtype)
        copy.copy_(values.flatten())
        self._copies.append((bytes_, start, start + size, None if written else copy.clone()))
        return copy.view(values.shape)

    def check(self) -> None:
        """Nothing but the written copies changed."""
        for bytes_, start, stop, before in self._copies:
            assert bool((bytes_[:start] == 0xFF).all()), "written before the beginning"
            assert bool((bytes_[stop:] == 0xFF).all()), "written behind the end"
            if before is not None:
                assert torch.equal(bytes_[start:stop], before.view(torch.uint8)), "input overwritten"
