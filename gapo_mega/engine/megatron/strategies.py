"""The gradient strategy that a configuration asks for."""

from __future__ import annotations

from typing import Any

import torch

from gapo_mega.config import Config
from gapo_mega.engine.megatron.build import Trainable
from gapo_mega.engine.megatron.gradients import GradientStrategy
from gapo_mega.engine.megatron.groups import Groups
from gapo_mega.engine.megatron.scoped import Scoped
from gapo_mega.engine.megatron.shards import Shards
from gapo_mega.engine.megatron.single import Single
from gapo_mega.gradient_choice import forward_kind, measures_change
from gapo_mega.models.shape import ModelShape


def build(config: Config, trainable: Trainable, groups: Groups, shape: ModelShape) -> GradientStrategy:
    """The strategy of ``config.gradients`` on this rank; its rows are allocated."""
    gradients = config.gradients
    common = (trainable, groups, len(config.objectives), shape.vocab, config.micro_batch_size)
    options: dict[str, Any] = {
        "shared": forward_kind(config, groups.layout.data) == "shared",
        "adam": gradients.metric == "adam",
    }
    if gradients.store == "single":
        return Single(*common, **options)
    if gradients.scope == "full":
        dtype = torch.bfloat16 if gradients.store_dtype == "bf16" else torch.float32
        return Shards(*common, dtype=dtype, actual_change=measures_change(config), **options)
    if gradients.scope == "last_layer":
        return Scoped(*common, layers=[], output_layer=True, **options)
    if gradients.scope == "last_block":
        last = [[shape.num_layers - 1, shape.num_layers]]
        return Scoped(*common, layers=last, output_layer=True, **options)
    return Scoped(*common, layers=gradients.scope, output_layer=False, **options)
