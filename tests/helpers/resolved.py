"""Resolved runs whose data and objectives are never used: preflight would import the objectives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gapo_mega import advantages, aggregation, losses
from gapo_mega.config import Config
from gapo_mega.models import HFDirectory, ModelShape, shape_of
from gapo_mega.objectives.base import ScoreModelRequest
from gapo_mega.planning.layout import check_layout
from gapo_mega.planning.resolved import ModelSource, ResolvedRun, ScoreModelSource

# Of a small model, as transformers names them; its plans are compared with arithmetic.
SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}


def resolved_run(
    config: Config,
    world: int = 1,
    *,
    shape: ModelShape | None = None,
    with_critic: bool | None = None,
    scored: Sequence[tuple[ScoreModelRequest, ModelShape]] = (),
) -> ResolvedRun:
    """Without objectives.

    ``shape``: of the policy; none: that of ``config.model.path``. ``with_critic``: value models, whatever the
    estimator needs.
    """
    estimator = advantages.build(config.advantages.name, **config.advantages.options)
    if shape is None:
        shape = shape_of(HFDirectory(Path(config.model.path)).config)
    if with_critic is None:
        with_critic = estimator.needs_values
    return ResolvedRun(
        config=config,
        world=world,
        policy=ModelSource(config.model.path, shape),
        critic=ModelSource(config.critic.path or config.model.path, shape) if with_critic else None,
        objectives=[],
        score_models=[ScoreModelSource(*found) for found in scored],
        aggregator=aggregation.build(config.aggregation.name, **config.aggregation.options),
        estimator=estimator,
        loss=losses.build(config.loss.name, **config.loss.options),
    )


def check(config: Config, shape: ModelShape, world: int) -> None:
    """``check_layout`` with the configuration's own estimator."""
    estimator = advantages.build(config.advantages.name, **config.advantages.options)
    check_layout(config, shape, world, estimator)
