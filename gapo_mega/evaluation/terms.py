"""The words and the one formula that pictures, page and audit share; docs/glossary.md defines the words."""

from __future__ import annotations

import numpy as np

from gapo_mega.config import GradientConfig
from gapo_mega.evaluation.series import Array

# A direction shorter than this share of its terms is what rounding left of them.
_ROUNDING = 1e-12


def parameters_measured(gradients: GradientConfig) -> str:
    """The parameters over which norms and inner products were taken."""
    scope = gradients.scope
    if scope == "full":
        return "all parameters"
    if scope == "last_layer":
        return "the output layer"
    if scope == "last_block":
        return "the output layer and the last transformer layer"
    parts = [str(first) if end == first + 1 else f"{first} to {end - 1}" for first, end in scope]
    return f"transformer layers {', '.join(parts)}"


def in_metric(gradients: GradientConfig) -> str:
    """What is added to the name of a norm or an inner product that is not the euclidean one."""
    return ", in Adam's metric" if gradients.metric == "adam" else ""


def cosines_with_direction(norms_SM: Array, weights_SM: Array, predicted_SM: Array) -> Array:
    """Cosine between every gradient and the direction at S steps, [S, M], in G's inner product.

    ``norms_SM`` are ``||g_i||``, ``predicted_SM`` ``(G w)_i``. 0 where the gradient or the direction is zero,
    NaN where a number is.
    """
    slopes = np.divide(predicted_SM, norms_SM, out=np.zeros_like(predicted_SM), where=norms_SM != 0)
    # sqrt(w'Gw) has half the digits where gradients cancel; ||d|| >= |<d, g_i>| / ||g_i|| has them all.
    squared = (weights_SM * predicted_SM).sum(axis=1)
    length = np.maximum(np.sqrt(np.maximum(squared, 0.0)), np.abs(slopes).max(axis=1))
    gone = length <= _ROUNDING * (norms_SM * np.abs(weights_SM)).sum(axis=1)
    cosines: Array = np.where(gone[:, None], 0.0, slopes / np.where(gone, 1.0, length)[:, None])
    return cosines
