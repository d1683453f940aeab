"""Checks across sections that need no model. All raise a one-line ``ValueError``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gapo_mega.config import strategies
from gapo_mega.config.fields import MOST_ROWS
from gapo_mega.config.gradients import GradientConfig
from gapo_mega.config.optimizer import OptimizerConfig

KL_ROW = "kl"  # the log's name for the divergence from the reference as a row


def check_average(average: float, gradients: GradientConfig) -> None:
    """Refuse running means where whole gradients are not at hand."""
    if average > 0 and not strategies.chosen(gradients).has_whole_rows:
        raise ValueError(
            f"aggregation.average: found {average} with gradients.store {gradients.store} and "
            f"gradients.scope {gradients.scope}, accepted: 0 (running means are of whole gradients: "
            "gradients.store shards with scope full)"
        )


def check_kl_row(kl: str, objectives: Sequence[str]) -> None:
    """Refuse a KL row beside objectives that leave no name or no room for it."""
    if kl not in ("objective", "apart"):
        return
    if KL_ROW in objectives:
        raise ValueError(
            f"objectives: found the name {KL_ROW} with algorithm.kl {kl}, accepted: another name (it is that "
            "of the KL row)"
        )
    if len(objectives) >= MOST_ROWS:
        raise ValueError(
            f"objectives: found {len(objectives)} with algorithm.kl {kl}, accepted: up to {MOST_ROWS - 1} "
            "(the KL is one more row)"
        )


def check_kl_target(target: float | None, kl: str, beta: float) -> None:
    """Refuse a target that nothing follows."""
    if target is None:
        return
    if kl == "objective":
        raise ValueError(
            f"algorithm.kl_target: found {target} with kl objective, accepted: none (the aggregation weighs "
            "the KL, and kl_beta is not used)"
        )
    if beta == 0:
        raise ValueError(
            f"algorithm.kl_target: found {target} with kl_beta 0, accepted: none, or kl_beta above 0 (the "
            "target multiplies kl_beta)"
        )


def check_correction(correction: str, bounds: Sequence[float], old_logprobs: str) -> None:
    """Refuse bounds that keep nothing, and a correction where there is only one distribution."""
    if bounds[0] > bounds[1]:
        raise ValueError(
            f"algorithm.correction_range: found {list(bounds)}, accepted: the least ratio before the greatest"
        )
    if correction not in ("auto", "none") and old_logprobs == "generator":
        raise ValueError(
            f"algorithm.correction: found {correction} with algorithm.old_logprobs generator, accepted: "
            "auto, none (the rollout's log-probabilities are then the trainer's too: the loss's own ratio is "
            "between policy and rollout)"
        )


def check_packing(tokens: int | None, longest: int) -> None:
    """Refuse packed rows that the longest sequence does not fit into."""
    if tokens is not None and tokens < longest:
        raise ValueError(
            f"micro_batch_tokens: found {tokens}, accepted: null, or at least data.max_prompt_tokens + "
            f"rollout.max_new_tokens ({longest}), the tokens of the longest sequence"
        )


def check_instances(instances: int, optimizers: Mapping[str, OptimizerConfig]) -> None:
    """Refuse several instances of what is none, by the section of an optimizer."""
    if instances == 1:
        return
    name = f"parallel.distributed_optimizer_instances: found {instances} with"
    for section, optimizer in optimizers.items():
        if not optimizer.distributed:
            raise ValueError(
                f"{name} {section}.distributed false, accepted: 1 (there is no distributed optimizer)"
            )
        if optimizer.overlap_grad_reduce:
            raise ValueError(
                f"{name} {section}.overlap_grad_reduce true, accepted: 1 (Megatron overlaps reductions over "
                "two groups on a CUDA stream of their own, which has not been run)"
            )
