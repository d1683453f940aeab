"""The operations on CPU tensors. ``isa`` and ``threads`` can be named; the results do not depend on
``threads``, and only in the last bits on ``isa``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gapo_mega.ops import _native
from gapo_mega.ops.arguments import Pieces, Weight

ISA_VARIABLE = "GAPO_ISA"


def active_isa() -> str:
    """Instruction set in use: the processor's best, or what the environment variable GAPO_ISA names."""
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
    """Adds the Gram matrix of checked rows to ``out``, float64 ``[m, m]``."""
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
    """Writes the weighted sum of checked rows to ``out``."""
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
