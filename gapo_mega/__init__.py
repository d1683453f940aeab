"""Gradient-Adaptive Policy Optimization on Megatron-core.

``gapo_mega.ops`` and ``gapo_mega.aggregation`` work in any PyTorch loop; the command ``gapo-mega`` trains.
"""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """``__version__``, read from the installed package when somebody asks for it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("gapo-mega")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
