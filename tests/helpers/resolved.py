"""A ``ResolvedRun`` for engines whose data and objectives are never used: preflight would import them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gapo_mega import advantages, aggregation, losses
from gapo_mega.config import Config
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.planning.resolved import ModelSource, ResolvedRun


def resolved_run(config: Config, world: int = 1, with_critic: bool = False) -> ResolvedRun:
    """Without objectives; ``with_critic``: value models, whatever the estimator."""
    policy = ModelSource(config.model.path, shape_of(HFDirectory(Path(config.model.path)).config))
    critic = dataclasses.replace(policy, path=config.critic.path or policy.path) if with_critic else None
    return ResolvedRun(
        config=config,
        world=world,
        policy=policy,
        critic=critic,
        objectives=[],
        score_models=[],
        aggregator=aggregation.build(config.aggregation.name, **config.aggregation.options),
        estimator=advantages.build(config.advantages.name, **config.advantages.options),
        loss=losses.build(config.loss.name, **config.loss.options),
    )
