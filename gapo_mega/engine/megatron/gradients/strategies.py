"""The gradient strategy that a configuration asks for."""

from __future__ import annotations

import torch

from gapo_mega.config import Config
from gapo_mega.engine.megatron.gradients.kept_rows import Shards
from gapo_mega.engine.megatron.gradients.no_rows import Single
from gapo_mega.engine.megatron.gradients.scoped import Scoped
from gapo_mega.engine.megatron.gradients.update import GradientStrategy, Setting
from gapo_mega.engine.megatron.model.build import Trainable
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.strategy import forward_kind, measures_change


def build(config: Config, trainable: Trainable, groups: Groups, shape: ModelShape) -> GradientStrategy:
    """The strategy of ``config.gradients`` on this rank; its rows are allocated."""
    gradients = config.gradients
    setting = Setting(
        trainable,
        groups,
        objectives=len(config.objectives),
        vocabulary=shape.vocab,
        micro_batch=config.micro_batch_size,
        shared=forward_kind(config, groups.layout.data) == "shared",
        adam=gradients.metric == "adam",
    )
    if gradients.store == "single":
        return Single(setting)
    if gradients.scope == "full":
        dtype = torch.bfloat16 if gradients.store_dtype == "bf16" else torch.float32
        return Shards(setting, dtype=dtype, actual_change=measures_change(config))
    if gradients.scope == "last_layer":
        return Scoped(setting, layers=[], output_layer=True)
    if gradients.scope == "last_block":
        last = [[shape.num_layers - 1, shape.num_layers]]
        return Scoped(setting, layers=last, output_layer=True)
    return Scoped(setting, layers=gradients.scope, output_layer=False)
