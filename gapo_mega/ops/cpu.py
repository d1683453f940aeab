"""The operations on CPU tensors.

Results do not depend on ``threads``; ``isa`` changes only their last bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gapo_mega.ops import _native
from gapo_mega.ops.arguments import DTYPE_CODES, Pieces, Weight

ISA_VARIABLE = "GAPO_ISA"


def active_isa() -> str:
    """The instruction set in use: the environment variable GAPO_ISA, or the processor's best."""
    available = _native.instruction_sets()
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted and wanted not in available:
        raise ValueError(
            f"{ISA_VARIABLE}: found {wanted!r}, accepted on this processor: {', '.join(available)}"
        )
    return wanted or available[0]


def gramian(
    rows: Pieces,
    segments: npt.NDArray[np.int64] | None,
    weight: Weight,
    out: Tensor,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Add the Gram matrix of checked rows to ``out``, float64 ``[m, m]``."""
    _native.gramian(
        rows.addresses,
        rows.lengths,
        rows.dtype_codes,
        segments,
        weight.addresses,
        weight.inverse_root,
        out.data_ptr(),
        threads or torch.get_num_threads(),
        isa or active_isa(),
    )


def combine(
    out: Pieces,
    rows: Pieces,
    weights: Sequence[float],
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Write the weighted sum of checked rows to ``out``."""
    _native.combine(
        rows.addresses,
        rows.lengths,
        rows.dtype_codes,
        weights,
        out.addresses,
        out.dtype_codes[0],
        threads or torch.get_num_threads(),
        isa or active_isa(),
    )


def accumulate(
    rows: Sequence[int],
    coefficients: Tensor,
    terms: Tensor,
    overwrite: bool,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Add to checked rows, given by their addresses; ``coefficients`` are contiguous."""
    _native.accumulate(
        rows,
        coefficients.data_ptr(),
        terms.data_ptr(),
        DTYPE_CODES[terms.dtype],
        terms.shape[0],
        terms.stride(0),
        terms.shape[1],
        overwrite,
        threads or torch.get_num_threads(),
        isa or active_isa(),
    )
