"""The streaming kernels: Gram matrix, combination, minimum-norm point, accumulation.

These functions do all work on whole gradients; the rest of the package sees ``[M, M]`` Gram matrices and
``[M]`` weights. They accept tensors on the CPU and on CUDA devices. Only this package imports the compiled
extension; ``reference.py`` implements the same operations in plain torch.
"""

from __future__ import annotations

from gapo_mega.ops.accumulate import accumulate_
from gapo_mega.ops.aggregate import aggregate_, solve, sum_gram_
from gapo_mega.ops.api import Status, combine_, duality_gap, gramian, info, min_norm, min_norm_
from gapo_mega.ops.arguments import InverseRoot
from gapo_mega.ops.kernels import fault_of
from gapo_mega.ops.method import Aggregated, AggregationMethod, HostAggregator, beyond_range, method_of

__all__ = [
    "Aggregated",
    "AggregationMethod",
    "HostAggregator",
    "InverseRoot",
    "Status",
    "accumulate_",
    "aggregate_",
    "beyond_range",
    "combine_",
    "duality_gap",
    "fault_of",
    "gramian",
    "info",
    "method_of",
    "min_norm",
    "min_norm_",
    "solve",
    "sum_gram_",
]
