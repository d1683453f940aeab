"""Two steps with one combination of settings, against transformers and autograd in float64."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega import aggregation
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.model.buffers import optimizer_instances
from gapo_mega.engine.megatron.model.lora import adapted_layers
from gapo_mega.engine.megatron.model.main_parameters import main_parameters
from gapo_mega.losses import Ppo
from tests.helpers.combinations import comparison
from tests.helpers.combinations.comparison import Observed
from tests.helpers.combinations.reference import (
    CLIP_EPSILON,
    Reference,
    directory_of,
    reference_of,
    tensors_of,
)
from tests.helpers.combinations.settings import LAYOUTS, ROWS, Setting, config_of
from tests.helpers.ranks.check_engine import build_engine

loss = Ppo(clip_epsilon=CLIP_EPSILON)


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: setting, and models, the folder of ``write_models``; rank 0 gives the verdict."""
    setting, models = Setting(**arguments["setting"]), Path(arguments["models"])
    reference = reference_of(models, setting.model, setting.tied, setting.temperature, setting.sampling)
    seen = observe(setting, directory_of(models, setting.model, setting.tied), reference)
    if seen is None:
        return {}
    return comparison.verdict(setting, comparison.errors(setting, seen, reference))


def observe(setting: Setting, model: Path, reference: Reference) -> Observed | None:
    """What the engine does with the reference's batch, on rank 0; None on the other ranks."""
    engine = build_engine(config_of(setting, str(model)))
    assert dist.get_world_size() == LAYOUTS[setting.layout].ranks
    rows = torch.arange(ROWS).chunk(engine.layout.data)[engine.layout.data_rank]
    batch = reference.batch.select(rows)
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    first = engine.update_policy(batch, loss, aggregator)
    held = [exported(engine, key, model.parent) for key in (None, "exp_avg", "exp_avg_sq")]
    second = engine.update_policy(batch, loss, aggregator)
    weights, momentum, moment = held
    if weights is None or momentum is None or moment is None:
        return None
    return Observed([first, second], weights, momentum, moment)


def exported(engine: MegatronEngine, key: str | None, folder: Path) -> dict[str, Tensor] | None:
    """Parameters, or a tensor of Adam's state, by Hugging Face names, whole, on rank 0. Collective.

    ``folder``: for the time being; whoever made it also clears away what a time limit leaves behind.
    """
    engine.policy.gather_parameters()
    kept = [parameter.detach().clone() for parameter in engine.policy.parameters()]
    if key is not None:
        _copy_(engine, adam_state(engine, key))
    with tempfile.TemporaryDirectory(dir=folder) as own:
        directory = Path(own) / "exported"
        if any(adapted_layers(engine.policy.modules)):
            engine.export_adapter(directory)
        else:
            engine.export_hf(directory)
        found = tensors_of(directory) if dist.get_rank() == 0 else None
    _copy_(engine, kept)
    return found


def adam_state(engine: MegatronEngine, key: str) -> list[Tensor]:
    """A tensor of Adam's state for every parameter of this rank, put together over those that hold it."""
    parameters = engine.policy.parameters()
    whole = {parameter: torch.zeros(parameter.numel()) for parameter in parameters}
    for inner in engine.policy.optimizer.chained_optimizers:
        for parameter, main, start, end in main_parameters(inner):
            whole[parameter][start:end] = inner.optimizer.state[main][key].detach().flatten()
    if engine.policy.chunks[0].ddp_config.use_distributed_optimizer:
        for parameter, value in whole.items():
            is_dense = getattr(parameter, "allreduce", True)
            dist.all_reduce(value, group=engine.groups.holders if is_dense else engine.groups.expert_data)
            value /= optimizer_instances()  # each of which has all of it
    return [whole[parameter].view(parameter.shape) for parameter in parameters]


@torch.no_grad()
def _copy_(engine: MegatronEngine, values: list[Tensor]) -> None:
    for parameter, value in zip(engine.policy.parameters(), values, strict=True):
        parameter.copy_(value)
