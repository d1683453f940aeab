"""Gradient-Adaptive Policy Optimization on Megatron-core.

``gapo_mega.ops`` and ``gapo_mega.aggregation`` work in any PyTorch loop; the command ``gapo-mega`` trains;
``gapo_mega.read_run`` makes data frames of what it logs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gapo_mega.evaluation.frames import read_run as read_run


def __getattr__(name: str) -> Any:
    """``__version__`` and ``read_run``, looked up when somebody asks for them."""
    if name == "__version__":
        from importlib.metadata import version

        return version("gapo-mega")
    if name == "read_run":
        from gapo_mega.evaluation.frames import read_run

        return read_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
