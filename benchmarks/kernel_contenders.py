"""Who takes part: ours, the ceilings, and the usual ways to do the same."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ceilings import Ceilings, Loops
from kernel_timing import Contender, Kind
from torch import Tensor

from gapo_mega import ops

INSTALL_TORCHJD = 'torchjd is not installed: pip install "torchjd[quadprog-projector]"'

OURS = "ours"
STACK = "torch stack"
DOTS = "torch.dot of pairs"
NUMPY = "numpy stack"
MGDA = "TorchJD MGDA"
UPGRAD = "TorchJD UPGrad"


def has_torchjd() -> bool:
    """Whether TorchJD is installed."""
    return importlib.util.find_spec("torchjd") is not None


def torchjd(name: str) -> Any:
    """A class of ``torchjd.aggregation``, or None: not installed, or without what it depends on."""
    if not has_torchjd():
        return None
    try:
        return getattr(importlib.import_module("torchjd.aggregation"), name)()
    except ImportError:
        return None


def set_threads(threads: int) -> bool:
    """Set torch's and numpy's number of threads. False where numpy's BLAS offers no way to set it."""
    torch.set_num_threads(threads)
    np.ones((2, 2)) @ np.ones((2, 2))  # loads the library
    told = False
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8") if maps.exists() else ""
    for library in sorted(set(re.findall(r"\S*/\S*openblas\S*", text))):
        loaded = ctypes.CDLL(library)
        for prefix in ("", "scipy_"):
            for suffix in ("", "64_"):
                function = getattr(loaded, f"{prefix}openblas_set_num_threads{suffix}", None)
                if function is not None:
                    function(ctypes.c_int(threads))
                    told = True
    return told


def make_rows(
    count: int, n: int, dtype: torch.dtype, device: str, seed: int = 0, stagger: int = 0
) -> list[Tensor]:
    """Gaussian rows of n elements, each beginning ``stagger`` bytes further into its allocation."""
    generator = torch.Generator(device=device).manual_seed(seed)
    rows = []
    for i in range(count):
        offset = i * stagger // dtype.itemsize
        row = torch.empty(n + offset, dtype=dtype, device=device)[offset:]
        rows.append(row.normal_(generator=generator))
    return rows


def restorer(row: Tensor) -> Callable[[], None]:
    """A call that resets the row to what it is now, so that operations in place find the same input.

    On the CPU one thread does it: torch's threads would still spin while the next contender runs.
    """
    saved = row.clone()
    if row.is_cuda:
        return lambda: void(row.copy_(saved))
    return lambda: void(
        ctypes.memmove(row.data_ptr(), saved.data_ptr(), saved.numel() * saved.element_size())
    )


def void(_: object) -> None:
    """Drop the value of an expression that is called for its effect."""


def _of_kind(kind: Kind, loops: Loops) -> list[Contender]:
    return [Contender(name, kind, run) for name, run in loops.items()]


def gram(
    rows: Sequence[Tensor], threads: int, ceilings: Ceilings | None, with_numpy: bool
) -> list[Contender]:
    """``run`` returns the Gram matrix as a tensor, an array or (pairs) a list of tensors."""

    def stack() -> Tensor:
        matrix = torch.stack(list(rows))
        return matrix @ matrix.T

    def dots() -> list[Tensor]:
        return [torch.dot(rows[i], rows[j]) for i in range(len(rows)) for j in range(i, len(rows))]

    contenders = [
        Contender(OURS, "ours", lambda: ops.gramian(rows)),
        Contender(STACK, "peer", stack),
        Contender(DOTS, "peer", dots),
    ]
    if with_numpy and rows[0].device.type == "cpu" and rows[0].dtype == torch.float32:
        arrays = [row.numpy() for row in rows]

        def numpy_stack() -> Any:
            matrix = np.stack(arrays)
            return matrix @ matrix.T

        contenders.append(Contender(NUMPY, "peer", numpy_stack))
    if ceilings is not None:
        contenders += _of_kind("ceiling", ceilings.read(rows, threads))
        contenders += _of_kind("arithmetic", ceilings.multiply_add(threads)[0])
    return contenders


def as_matrix(result: Any, m: int) -> Tensor:
    """What a contender of ``gram`` returned, as float64 ``[m, m]``."""
    if isinstance(result, list):
        matrix = torch.zeros(m, m, dtype=torch.float64)
        rows, columns = torch.triu_indices(m, m)
        matrix[rows, columns] = torch.stack(result).double().cpu()
        return matrix + matrix.triu(1).T
    return torch.as_tensor(result).double().cpu()


def combine(rows: Sequence[Tensor], threads: int, ceilings: Ceilings | None) -> list[Contender]:
    """In place, on the last row. The peer's rows are stacked beforehand, which is not timed."""
    m = len(rows)
    weights = torch.tensor([1.0 / (i + 2) for i in range(m)], dtype=torch.float64)
    weights = (weights / weights.sum()).to(rows[0].device)
    stacked = torch.stack(list(rows))
    factors = weights.to(stacked.dtype)
    contenders = [
        Contender(OURS, "ours", lambda: ops.combine_(rows[-1], rows, weights)),
        Contender(
            "torch w @ J, copied back",
            "peer",
            lambda: rows[-1].copy_(factors @ stacked),
            setup_bytes=stacked.numel() * stacked.element_size(),
        ),
    ]
    if ceilings is not None:
        contenders += _of_kind("ceiling", ceilings.combine(rows[-1], rows, threads))
    return contenders


def step(rows: Sequence[Tensor]) -> list[Contender]:
    """Gram matrix, weights of MGDA, combination: ours in place on the last row, the peers' to new memory."""
    m, device = len(rows), rows[0].device
    weights = torch.empty(m, dtype=torch.float64, device=device)
    status = torch.empty(1, dtype=torch.int32, device=device)

    def ours() -> None:
        gramian = ops.gramian(rows)
        if gramian.is_cuda:
            ops.min_norm_(weights, status, gramian)
            ops.combine_(rows[-1], rows, weights)
        else:
            ops.combine_(rows[-1], rows, ops.min_norm(gramian))

    def stack() -> Tensor:
        matrix = torch.stack(list(rows))
        gramian = (matrix @ matrix.T).double()
        # A product in the rows' type need not be symmetric to the last bit.
        return ops.min_norm((gramian + gramian.T) / 2).to(matrix.dtype) @ matrix

    contenders = [Contender(OURS, "ours", ours), Contender(STACK, "peer", stack)]
    for name, label in (("MGDA", MGDA), ("UPGrad", UPGRAD)):
        aggregator = torchjd(name)
        if aggregator is not None:

            def theirs(aggregator: Any = aggregator) -> Any:
                return aggregator(torch.stack(list(rows)))

            contenders.append(Contender(label, "peer", theirs))
    return contenders
