"""Megatron's reduction of gradients over data ranks, tensor ranks and stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from gapo_mega.engine.megatron.model.buffers import bucket_groups_of


def reduce_gradients(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **options: Any
) -> None:
    """Megatron's gradient reduction over data ranks, tensor ranks and stages, without its division by tokens.

    Every loss is already divided by the tokens of its minibatch over all ranks and microbatches, so this
    ignores the schedule's count.
    """
    groups = [group for chunk in model for group in bucket_groups_of(chunk)]
    gathered = [group.param_gather_dispatched for group in groups]
    finalize_model_grads(model, None, **options)
    # Megatron takes a reduction for the end of a step, and would gather unchanged parameters again.
    for group, before in zip(groups, gathered, strict=True):
        group.param_gather_dispatched = before


@contextmanager
def without_overlap(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Reduce after the backward: a bucket with gradients for only some parameters never becomes ready."""
    settings = chunks[0].ddp_config  # of all chunks, as ``assumptions.check`` has found
    before = settings.overlap_grad_reduce
    settings.overlap_grad_reduce = False
    try:
        yield
    finally:
        settings.overlap_grad_reduce = before


def is_summed_over_tensor_ranks(config: TransformerConfig, name: str, parameter: nn.Parameter) -> bool:
    """The decision of ``finalize_model_grads``, which ``assumptions.check`` compares with what it does."""
    if config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name):
        return True
    return bool(config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
