"""Everything that can be refused before a model is built or a process started."""

from __future__ import annotations

from pathlib import Path

import torch

from gapo_mega import advantages, aggregation, losses, objectives
from gapo_mega.config import Config
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.directory import HFDirectory
from gapo_mega.models.huggingface.location import companions_of
from gapo_mega.models.registry import shape_of
from gapo_mega.models.score_head import score_head_of
from gapo_mega.models.shape import ModelShape
from gapo_mega.objectives.base import ScoreModelRequest
from gapo_mega.planning.layout import check_layout, check_model_split
from gapo_mega.runs.log import check_logging


def check(config: Config, world_size: int) -> ModelShape:
    """The policy's shape; ``ValueError`` for what does not fit together. Reads no weights."""
    return check_models(config, world_size)[0]


def check_models(
    config: Config, world_size: int
) -> tuple[ModelShape, list[tuple[ScoreModelRequest, ModelShape]]]:
    """``check``, and the score models that objectives want of the engine."""
    shape = _shape(config.model.path)
    check_layout(config, shape, world_size)
    check_logging(config.logging)
    aggregator = aggregation.build(config.aggregation.name, **config.aggregation.options)
    # Any Gram matrix will do to find options of another number of objectives.
    aggregator(torch.eye(len(config.objectives), dtype=torch.float64))
    advantages.build(config.advantages.name, **config.advantages.options)
    losses.build(config.loss.name, **config.loss.options)
    wanted = [(objective.name, objectives.build(objective).wanted_model) for objective in config.objectives]
    scored = [
        (request, _score_shape(config, name, request.path, world_size))
        for name, request in wanted
        if request is not None
    ]
    return shape, scored


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


def _shape(path: str) -> ModelShape:
    """Of a Hugging Face directory or hub name, from its configuration only."""
    return shape_of(read_config(companions_of(Path(path).expanduser())))
