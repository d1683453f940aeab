"""What torch.compile does at the operations: it leaves its graph, and runs them as they are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def never_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that works on addresses, which torch.compile cannot trace: one graph break each."""
    marked: list[Callable[P, T]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # torch's own mark imports its compiler, which takes seconds: not where nobody compiles.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not marked:
            marked.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return marked[0](*args, **kwargs)

    return call
