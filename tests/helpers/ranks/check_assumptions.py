"""What the start says of Megatron's objects on several ranks, as they are and broken on every rank alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from gapo_mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from gapo_mega.engine.megatron.model import assumptions
from gapo_mega.engine.megatron.model.build import build_chunks
from gapo_mega.engine.megatron.model.modules import RMSNorm
from gapo_mega.engine.megatron.model.optimizer import Trainable, make_trainable
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models.shape import ModelShape
from tests.helpers.ranks import worlds


def _trained(args: dict[str, Any]) -> Trainable:
    """Tied embeddings, and norms of queries and keys."""
    layout = ParallelConfig.model_validate(args["layout"])
    worlds.enter_layout(layout)
    shape = ModelShape(
        family="qwen3", num_layers=2, hidden=24, ffn=40, heads=4, kv_groups=2, head_dim=6, vocab=256,
        tied=True, rope_theta=10000.0, norm_eps=1e-5, qkv_bias=False, qk_norm=True, max_positions=64,
    )  # fmt: skip
    optimizer = OptimizerConfig.model_validate(args.get("optimizer", {}))
    chunks = build_chunks(shape, ModelConfig(path="unused"), layout)
    return make_trainable(chunks, optimizer, total_steps=20)


def _reduce_over_data_ranks_only(made: Trainable) -> None:
    made.model.config.finalize_model_grads_func = lambda models, *_, **__: models[0].finish_grad_sync()


def _measure_norms_in_the_tensor_group(made: Trainable) -> None:
    group = parallel_state.get_tensor_model_parallel_group()
    made.optimizer.chained_optimizers[0].grad_stats_parallel_group = group


def _measure_norms_everywhere(made: Trainable) -> None:
    made.optimizer.chained_optimizers[0].grad_stats_parallel_group = dist.group.WORLD


def _reduce_in_the_tensor_group(made: Trainable) -> None:
    for group in made.model.bucket_groups:
        group.intra_distributed_optimizer_instance_group = parallel_state.get_tensor_model_parallel_group()


def _swap_the_shared_copy(made: Trainable) -> None:
    gpt = made.model.module
    gpt.shared_embedding_or_output_weight().shared = gpt.pre_process


def _split_the_norms(made: Trainable) -> None:
    for module in made.model.modules():
        if isinstance(module, RMSNorm):
            module.weight.tensor_model_parallel = True  # type: ignore[attr-defined]


def _gather_nothing(made: Trainable) -> None:
    for group in made.model.bucket_groups:
        group.start_param_sync = lambda *_, **__: None


def _gather_once(made: Trainable) -> None:
    """Forget that parameters were stepped since."""
    for group in made.model.bucket_groups:
        finish = group.finish_param_sync

        def as_if_gathered(
            *args: Any, group: Any = group, finish: Callable[..., None] = finish, **kwargs: Any
        ) -> None:
            group.param_gather_dispatched = True
            finish(*args, **kwargs)

        group.finish_param_sync = as_if_gathered


BREAKS: dict[str, Callable[[Trainable], None]] = {
    "nothing": lambda made: None,
    "reduce_over_data_ranks_only": _reduce_over_data_ranks_only,
    "measure_norms_in_the_tensor_group": _measure_norms_in_the_tensor_group,
    "measure_norms_everywhere": _measure_norms_everywhere,
    "reduce_in_the_tensor_group": _reduce_in_the_tensor_group,
    "swap_the_shared_copy": _swap_the_shared_copy,
    "split_the_norms": _split_the_norms,
    "gather_nothing": _gather_nothing,
    "gather_once": _gather_once,
}


def run(args: dict[str, Any]) -> dict[str, Any]:
    """What each rank's check says (None: nothing) in ``args["layout"]`` after ``args["breaks"]``."""
    said: str | None = None
    with megatron_device():
        made = _trained(args)
        BREAKS[args["breaks"]](made)
        try:
            assumptions.check([made.model], made.optimizer)
        except RuntimeError as error:
            said = str(error)
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    return {"said": everyone}
