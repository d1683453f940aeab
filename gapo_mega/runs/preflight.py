"""Refuses everything that can be refused before a model is built or a process started."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from gapo_mega import advantages, aggregation, losses, objectives
from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.config import Config
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.directory import HFDirectory
from gapo_mega.models.huggingface.location import companions_of
from gapo_mega.models.registry import shape_of
from gapo_mega.models.score_head import score_head_of
from gapo_mega.models.shape import ModelShape
from gapo_mega.objectives.base import Objective
from gapo_mega.planning.layout import check_layout, check_model_split
from gapo_mega.planning.resolved import ModelSource, ResolvedRun, ScoreModelSource
from gapo_mega.runs.log import check_logging

# Fields in which a value model's backbone may differ from the policy: its head replaces the output layer, and
# families of one shape store the same tensors. Only the lengths that occur must fit.
_FREE_IN_A_CRITIC = ("family", "tied", "max_positions", "sliding_window")


def resolve(config: Config, world_size: int) -> ResolvedRun:
    """The run that ``config`` describes on ``world_size`` processes. Reads no weights and no data.

    Raises ``ValueError`` for the first thing that does not fit together.
    """
    shape = _shape(config.model.path)
    estimator = advantages.build(config.advantages.name, **config.advantages.options)
    check_layout(config, shape, world_size, estimator)
    check_logging(config.logging)
    aggregator = aggregation.build(config.aggregation.name, **config.aggregation.options)
    # Any Gram matrix exposes options for another number of objectives.
    aggregator(torch.eye(len(config.objectives), dtype=torch.float64))
    built = [objectives.build(objective) for objective in config.objectives]
    return ResolvedRun(
        config=config,
        world=world_size,
        policy=ModelSource(config.model.path, shape),
        critic=_critic(config, shape, estimator),
        objectives=built,
        score_models=_score_models(config, built, world_size),
        aggregator=aggregator,
        estimator=estimator,
        loss=losses.build(config.loss.name, **config.loss.options),
    )


def _critic(config: Config, policy: ModelShape, estimator: AdvantageEstimator) -> ModelSource | None:
    """The value models' backbone, which has the policy's shape: they read the policy's tokens."""
    if not estimator.needs_values:
        return None
    path = config.critic.path
    if path is None:
        return ModelSource(config.model.path, policy)
    found = _shape(path, "critic.path")
    for field in dataclasses.fields(ModelShape):
        mine, wanted = getattr(found, field.name), getattr(policy, field.name)
        if mine != wanted and field.name not in _FREE_IN_A_CRITIC:
            raise ValueError(
                f"critic.path: found {path} with {field.name} {mine}, accepted: a backbone of the policy's "
                f"shape, with {field.name} {wanted}"
            )
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    most = min(found.max_positions, found.sliding_window or found.max_positions)
    if longest > most:
        raise ValueError(
            f"critic.path: found {path} for sequences of at most {most} tokens, accepted: one for the "
            f"{longest} of data.max_prompt_tokens + rollout.max_new_tokens"
        )
    return ModelSource(path, policy)


def _score_models(config: Config, built: Sequence[Objective], world_size: int) -> list[ScoreModelSource]:
    return [
        ScoreModelSource(
            objective.wanted_model,
            _score_shape(config, objective.name, objective.wanted_model.path, world_size),
        )
        for objective in built
        if objective.wanted_model is not None
    ]


def _score_shape(config: Config, objective: str, path: str, world_size: int) -> ModelShape:
    try:
        shape = _shape(path)
        check_model_split(config.parallel, shape, world_size)
        if (Path(path) / "config.json").is_file():  # a checkpoint says so when it is loaded
            directory = HFDirectory(path)
            if score_head_of(directory.config, directory.names) is None:
                raise ValueError("found a language model, accepted: a model with one score a text")
    except ValueError as error:
        raise ValueError(f"objective {objective!r}: its score model {path}: {error}") from error
    return shape


def _shape(path: str, parameter: str = "model.path") -> ModelShape:
    """The shape of the model in a Hugging Face directory or hub name, from its configuration only."""
    return shape_of(read_config(companions_of(Path(path).expanduser()), parameter))
