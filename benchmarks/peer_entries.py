"""Who takes part in benchmarks/peers.py. Imports nothing heavy, because the starting process uses it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gapo_mega.config.strategies import variants
from gapo_mega.config.strategies.scoped import has_output_layer, layers_in

Stack = Literal["hf", "ours"]
Kind = Literal["single", "autograd", "autojac", "autogram", "ours"]

HF_SINGLE = "HF, one objective"
OURS_SINGLE = "ours, one objective"
STACKED = "autograd, stacked"  # what all Gram matrices are compared with
TORCHJD_KINDS = ("autojac", "autogram")


def known_strategies() -> dict[str, dict[str, Any]]:
    """Sections `gradients` of the configuration, as strategies declare them; more by --strategy NAME=JSON."""
    return {variant.name: dict(variant.gradients) for variant in variants() if variant.against_peers}


@dataclass(frozen=True)
class Entry:
    """One contender. ``options``: of its kind; for ours, the section ``gradients``."""

    name: str
    stack: Stack
    kind: Kind
    options: dict[str, Any] = field(default_factory=dict)

    def objectives(self, asked: int) -> int:
        """How many it combines where the others combine ``asked``."""
        return 1 if self.kind == "single" else asked

    @property
    def scope(self) -> str | list[list[int]]:
        """Parameters that enter its inner products: ``gradients.scope`` of the configuration."""
        found: str | list[list[int]] = self.options.get("scope", "full")
        return found

    @property
    def tolerance(self) -> float:
        """Largest accepted error of its Gram matrix, as a share of ``|g_i| |g_j|``."""
        if self.kind == "autogram":
            return 1e-3  # it adds up fp32 products of millions of elements; off by 1e-4 at 34 M parameters
        return 2**-8 if self.options.get("store_dtype") == "bf16" else 1e-4


HF_ENTRIES = (
    Entry(HF_SINGLE, "hf", "single"),
    Entry(STACKED, "hf", "autograd"),
    # The same without the second copy that torch.stack makes.
    Entry("autograd, rows in place", "hf", "autograd", {"in_place": True}),
)

TORCHJD_ENTRIES = (
    Entry("autojac UPGrad", "hf", "autojac", {"aggregator": "UPGrad"}),
    Entry("autojac MGDA", "hf", "autojac", {"aggregator": "MGDA"}),
    Entry("autojac Mean", "hf", "autojac", {"aggregator": "Mean"}),
    # Both of its settings for less memory: rows one by one, no united Jacobian.
    Entry("autojac UPGrad, frugal", "hf", "autojac", {"aggregator": "UPGrad", "frugal": True}),
    # batch_dim None: m outputs. By sequence: m x B outputs whose Gram matrix is summed to m x m.
    Entry("autogram", "hf", "autogram", {"by_sequence": False}),
    Entry("autogram, by sequence", "hf", "autogram", {"by_sequence": True}),
)


def has_torchjd() -> bool:
    """Whether TorchJD is installed with the solver that its UPGrad needs."""
    return all(importlib.util.find_spec(package) for package in ("torchjd", "qpsolvers", "quadprog"))


def entries(strategies: dict[str, dict[str, Any]], leave_out: Sequence[str], torchjd: bool) -> list[Entry]:
    """All that run: the single-objective step of each stack first, and always the Gram matrices' reference.

    Raises:
        ValueError: ``leave_out`` names one that does not exist or that must stay.
    """
    everything = [
        *HF_ENTRIES,
        *TORCHJD_ENTRIES,
        # One forward and one backward, as without gapo_mega.
        Entry(OURS_SINGLE, "ours", "single", {"forward": "separate"}),
        *(Entry(f"ours, {name}", "ours", "ours", section) for name, section in strategies.items()),
    ]
    needed = (HF_SINGLE, STACKED, OURS_SINGLE)
    accepted = [entry.name for entry in everything if entry.name not in needed]
    for name in leave_out:
        if name not in accepted:
            raise ValueError(f"leave_out: found {name!r}, accepted: {'; '.join(accepted)}")
    return [
        entry
        for entry in everything
        if entry.name not in leave_out and (torchjd or entry.kind not in TORCHJD_KINDS)
    ]


def scope_key(scope: str | list[list[int]]) -> str:
    """A scope as a key of JSON."""
    return scope if isinstance(scope, str) else str([list(pair) for pair in scope])


def in_scope(name: str, scope: str | list[list[int]], layers: int) -> bool:
    """Whether a parameter of transformers' Llama enters the inner products of ``gradients.scope``."""
    if scope == "full":
        return True
    if name == "lm_head.weight":
        return has_output_layer(scope)
    inside = name.startswith("model.layers.")
    return inside and any(first <= int(name.split(".")[2]) < end for first, end in layers_in(scope, layers))
