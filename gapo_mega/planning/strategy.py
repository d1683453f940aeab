"""What ``gradients.forward: auto`` comes to, and what cannot be combined in a given layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gapo_mega.config import Config
from gapo_mega.optional import transformer_engine_layers


def microbatches(config: Config, data_parallel: int) -> int:
    """Forward passes of a data-parallel rank over one minibatch."""
    rollout = config.rollout
    sequences = rollout.prompts_per_step // data_parallel * rollout.samples_per_prompt
    return sequences // config.algorithm.minibatches // config.micro_batch_size


def forward_kind(config: Config, data_parallel: int) -> Literal["shared", "separate"]:
    """The passes that the run takes.

    Shared passes save m - 1 of m forwards. They reduce every objective's gradient once per microbatch
    instead of once per minibatch, which may cost more than it saves: where that would be so, ``auto``
    takes separate passes.
    """
    asked = config.gradients.forward
    if asked != "auto":
        return asked
    count = microbatches(config, data_parallel)
    possible = config.parallel.pipeline == 1 and refusal_of_shared(config, count) is None
    return "shared" if possible and (count == 1 or data_parallel == 1) else "separate"


def refusal_of_shared(config: Config, count: int) -> str | None:
    """Why shared passes over ``count`` microbatches do not work with the other settings, if so."""
    gradients = config.gradients
    if transformer_engine_layers() and gradients.scope != "last_layer" and len(config.objectives) > 1:
        return "Transformer Engine's layers (they drop what a second backward would need)"
    partial = isinstance(gradients.scope, list) or gradients.scope == "last_block"
    if partial and config.model.recompute != "none":
        return f"model.recompute {config.model.recompute} (recomputed layers have no partial backward)"
    if count == 1:
        return None
    reasons = {
        "store single": gradients.store == "single",
        "store_dtype bf16 (the sum over microbatches would be rounded every time)": gradients.store_dtype
        == "bf16",
        f"scope {gradients.scope}": gradients.scope != "full",
    }
    for reason, holds in reasons.items():
        if holds:
            return f"{count} microbatches and {reason}"
    return None


@dataclass(frozen=True)
class PassCount:
    """Full forwards and backwards over a minibatch in one update."""

    forwards: int
    backwards: int


def passes(config: Config, data_parallel: int) -> PassCount:
    """What the strategy runs; partial backwards (of a scope) are not counted."""
    gradients, objectives = config.gradients, len(config.objectives)
    shared = forward_kind(config, data_parallel) == "shared"
    if gradients.scope != "full":
        with_layers = gradients.scope != "last_layer"
        with_output = isinstance(gradients.scope, str)
        return PassCount(1 if shared else 1 + with_output + with_layers * objectives, 1)
    if gradients.store == "single":
        backwards = objectives * (objectives + 1) // 2 + (1 if objectives > 1 else 0)
    else:
        backwards = objectives
    return PassCount(1 if shared else backwards, backwards)


def measures_change(config: Config) -> bool:
    """What ``gradients.actual_change`` comes to: on by itself with the adam metric where rows are kept."""
    gradients = config.gradients
    if gradients.actual_change is not None:
        return gradients.actual_change
    return gradients.metric == "adam" and gradients.store == "shards" and gradients.scope == "full"
