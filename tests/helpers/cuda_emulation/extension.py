"""Calls of the emulated extension: the only place that knows its signatures."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from tests.helpers.cuda_emulation.memory import GuardedMemory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of their codes
SCHEDULES = {"ascending": 0, "descending": 1, "random": 2}


class Emulated:
    """The extension as it was built for the emulator, with the device that it finds."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("_native", path)
        assert spec is not None and spec.loader is not None
        self.native: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.native)
        self.library = ctypes.CDLL(str(path))
        self.library.cuda_emulation_case.restype = ctypes.c_char_p
        self.memory = GuardedMemory()
        # Elements that a block of gramian takes at a time: the third column counts them.
        many = 1 << 30
        chunks = self.plan([many, 1], [(0, many), (many, many + 1)])[1][2]
        self.chunk = many // chunks
        assert self.chunk * chunks == many

    def configure(self, schedule: str = "ascending", multiprocessors: int = 2) -> None:
        self.library.cuda_emulation_configure(multiprocessors, SCHEDULES[schedule])

    def machine(self, devices: int = 1, driver: int = 13000, load_error: int = 0) -> None:
        """What the next calls find: devices, the driver's CUDA version, how loading a kernel ends."""
        self.library.cuda_emulation_machine(devices, driver, load_error)

    def calls_with_lock(self) -> int:
        """Calls of the runtime so far that kept Python's other threads waiting."""
        return self.library.cuda_emulation_calls_with_lock()

    def case(self, name: str, out: Tensor) -> str:
        """What one of faults.cu ends with."""
        return self.library.cuda_emulation_case(name.encode(), ctypes.c_void_p(out.data_ptr())).decode()

    def _make_plan(self, lengths: list[int], segments: Sequence[tuple[int, int]] | None) -> object:
        ranges = None if segments is None else np.array(segments, dtype=np.int64).reshape(-1, 2)
        return self.native.cuda_plan(lengths, ranges)

    def plan(self, lengths: list[int], segments: Sequence[tuple[int, int]] | None) -> list[tuple[int, ...]]:
        """Begin and end within the piece, and first chunk, of every run."""
        table = self._make_plan(lengths, segments).table
        return [tuple(table[i : i + 3]) for i in range(0, len(table), 3)]

    def gramian(
        self,
        rows: list[list[Tensor]],
        segments: Sequence[tuple[int, int]] | None = None,
        weight: Sequence[Tensor] = (),
        inverse_root: tuple[float, float] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Of rows in pieces, added to a copy of ``out``."""
        m = len(rows)
        lengths = [piece.numel() for piece in rows[0]]
        plan = self._make_plan(lengths, segments)
        table = self.memory.place(torch.tensor(plan.table, dtype=torch.int64))
        size = self.native.cuda_workspace_size(m, 0)
        workspace = self.memory.place(torch.full((size,), torch.nan, dtype=torch.float64), written=True)
        start = torch.zeros(m, m, dtype=torch.float64) if out is None else out
        found = self.memory.place(start, written=True)
        self.native.cuda_gramian(
            [piece.data_ptr() for row in rows for piece in row],
            lengths,
            [DTYPES.index(row[0].dtype) for row in rows],
            [piece.data_ptr() for piece in weight],
            inverse_root,
            plan,
            table.data_ptr(),
            workspace.data_ptr(),
            found.data_ptr(),
            0,
            0,
        )
        return found

    def combine(self, out: list[Tensor], rows: list[list[Tensor]], weights: Sequence[float]) -> None:
        on_device = self.memory.place(torch.tensor(weights, dtype=torch.float64))
        self.native.cuda_combine(
            [piece.data_ptr() for row in rows for piece in row],
            [piece.numel() for piece in rows[0]],
            [DTYPES.index(row[0].dtype) for row in rows],
            on_device.data_ptr(),
            [piece.data_ptr() for piece in out],
            DTYPES.index(out[0].dtype),
            0,
            0,
        )

    def min_norm(self, gram: Tensor, exclude_zero: bool = False) -> tuple[Tensor, int]:
        m = gram.shape[0]
        given = self.memory.place(gram)
        weights = self.memory.place(torch.full((m,), 7.0, dtype=torch.float64), written=True)
        status = self.memory.place(torch.full((1,), 7, dtype=torch.int32), written=True)
        addresses = (weights.data_ptr(), status.data_ptr())
        self.native.cuda_min_norm(given.data_ptr(), m, exclude_zero, *addresses, 0, 0)
        return weights, int(status)

    def host_min_norm(self, gram: Tensor, exclude_zero: bool = False) -> tuple[Tensor, int]:
        weights = torch.full((gram.shape[0],), 7.0, dtype=torch.float64)
        given = gram.contiguous()
        status = self.native.min_norm(given.data_ptr(), gram.shape[0], exclude_zero, weights.data_ptr())
        return weights, status
