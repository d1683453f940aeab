"""The streaming kernels: Gram matrix, combination, minimum-norm point.

Everything large about gradients happens here; the rest of the package sees ``[M, M]`` Gram matrices
and ``[M]`` weights. This is the only package that imports the compiled extension. Tensors on the
CPU and on CUDA devices are accepted alike; ``reference.py`` holds the same in plain torch.
"""

from __future__ import annotations

from gapo_mega.ops.api import Status, combine_, gramian, info, min_norm, min_norm_device

__all__ = ["Status", "combine_", "gramian", "info", "min_norm", "min_norm_device"]
