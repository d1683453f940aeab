"""The streaming kernels: Gram matrix, combination, minimum-norm point.

Everything large about gradients happens here; the rest of the package sees ``[M, M]`` Gram matrices
and ``[M]`` weights. This is the only package that imports the compiled extension. Tensors on the
CPU and on CUDA devices are accepted alike; ``reference.py`` holds the same in plain torch.
"""

from __future__ import annotations

from gapo_mega.ops.aggregate import aggregate_, solve, sum_gram_
from gapo_mega.ops.api import Status, combine_, duality_gap, gramian, info, min_norm, min_norm_
from gapo_mega.ops.arguments import InverseRoot
from gapo_mega.ops.method import Aggregated, AggregationMethod, HostAggregator, method_of

__all__ = [
    "Aggregated",
    "AggregationMethod",
    "HostAggregator",
    "InverseRoot",
    "Status",
    "aggregate_",
    "combine_",
    "duality_gap",
    "gramian",
    "info",
    "method_of",
    "min_norm",
    "min_norm_",
    "solve",
    "sum_gram_",
]
