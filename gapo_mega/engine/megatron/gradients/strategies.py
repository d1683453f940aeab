"""Builds a run's gradient strategy: ``config/strategies/`` declares it, and this folder implements it.

Every ``GradientStrategy`` of this folder names the declaration that it implements.
"""

from __future__ import annotations

import torch

import gapo_mega.engine.megatron.gradients as package
from gapo_mega.config.strategies import StrategyDeclaration
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.gradients.update import GradientStrategy, Setting
from gapo_mega.engine.megatron.model.buffers import buffers_of
from gapo_mega.engine.megatron.model.logprobs import Distribution
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.planning.chunks import logits_chunk
from gapo_mega.planning.memory import average_bytes, rank_sizes
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.registry import implementations


def build(resolved: ResolvedRun, trainable: Trainable, groups: Groups, rows: int) -> GradientStrategy:
    """Build the run's strategy for updates that measure ``rows`` gradients, on this rank; allocate them."""
    config, shape, declared = resolved.config, resolved.shape, resolved.strategy_of(rows)
    setting = Setting(
        trainable,
        groups,
        objectives=rows,
        distribution=Distribution.of(shape.vocab, SamplingParameters.of(config.rollout)),
        layers=shape.num_layers,
        micro_batch=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        shared=resolved.forward_of(rows) == "shared",
        adam=config.gradients.metric == "adam",
        longest=config.rollout.max_new_tokens,
        entropy_beta=config.algorithm.entropy_beta,
        measures_entropy=config.logging.entropy,
        chunk=logits_chunk(config, shape),
        routers=(config.model.router_aux_loss, config.model.router_z_loss),
        average=config.aggregation.average,
        average_dtype=torch.bfloat16 if config.aggregation.average_dtype == "bf16" else torch.float32,
    )
    strategy = implementation_of(type(declared))(setting, declared)
    whole = sum(buffer.grad_data.numel() for chunk in trainable.chunks for buffer in buffers_of(chunk))
    stage = groups.layout.pipeline_rank
    sizes = rank_sizes(config.parallel, shape, strategy.shard.numel, whole, stage, config.model.lora)
    expected = declared.row_bytes(setting.objectives, sizes) + average_bytes(resolved, sizes)
    found = strategy.row_bytes
    as_declared = (
        found == expected if declared.rows_are_even or groups.holders.size() == 1 else found <= expected
    )
    assert as_declared, f"{declared.name} declares {expected} bytes of rows and has {found}"
    return strategy


def implementation_of(declared: type[StrategyDeclaration]) -> type[GradientStrategy]:
    """The class that implements ``declared``; ``RuntimeError`` unless there is exactly one."""
    found = [kind for kind in implementations(package, GradientStrategy) if kind.declaration is declared]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise RuntimeError(f"strategy {declared.name}: implemented by {names}; exactly one class should")
    return found[0]
