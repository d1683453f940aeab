"""GAPO steps of a tiny model in one layout: losses, Gram, norms and the parameters they lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from gapo_mega import aggregation
from gapo_mega.config import Config
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.losses import Ppo, value_loss_sum
from gapo_mega.types import Experience
from tests.helpers.ranks import worlds
from tests.helpers.resolved import resolved_run

OBJECTIVES = 3
ROWS, COLUMNS = 8, 21  # odd: sequence parallelism has to pad

CLIP_EPSILON = 0.1

loss = Ppo(clip_epsilon=CLIP_EPSILON)


def make_config(path: str, layout: dict[str, Any], optimizer: dict[str, Any], **sections: Any) -> Config:
    """A configuration whose data and objectives are never used."""
    return Config.model_validate(
        {
            "output_dir": "unused",
            "steps": 4,
            "micro_batch_size": 2,
            "model": {"path": path, **sections.pop("model", {})},
            "parallel": layout,
            "data": {"source": "unused"},
            "rollout": {"prompts_per_step": ROWS // 2, "samples_per_prompt": 2},
            "objectives": [{"name": f"o{i}", "function": "m:f"} for i in range(OBJECTIVES)],
            "optimizer": {"schedule": "constant", "warmup_fraction": 0.0, "clip_grad": 0.0, **optimizer},
            **sections,
        }
    )


def global_batch(vocabulary: int) -> Experience:
    """The same on every rank: unequal prompt and response lengths, three advantages that disagree."""
    generator = torch.Generator().manual_seed(5)
    tokens_BT = torch.randint(3, vocabulary, (ROWS, COLUMNS), generator=generator)
    prompt_B = torch.randint(2, 7, (ROWS,), generator=generator)
    length_B = prompt_B + torch.randint(1, COLUMNS - 7, (ROWS,), generator=generator)
    length_B[0] = COLUMNS
    position_T = torch.arange(COLUMNS)
    mask_BT = (position_T >= prompt_B[:, None]) & (position_T < length_B[:, None])
    advantages_MB = torch.randn(OBJECTIVES, ROWS, generator=generator)
    advantages_MB[1] = -0.7 * advantages_MB[0] + 0.5 * advantages_MB[1]
    advantages_MB[2] *= 3.0
    noise_BT = 0.05 * torch.randn(ROWS, COLUMNS, generator=generator)
    empty = torch.zeros(ROWS, COLUMNS)
    return Experience(
        tokens_BT=torch.where(position_T < length_B[:, None], tokens_BT, 0),
        response_mask_BT=mask_BT,
        group_B=torch.arange(ROWS) // 2,
        old_logprobs_BT=noise_BT,  # the worker adds the policy's own
        ref_logprobs_BT=empty,
        scores_MB=advantages_MB,
        token_rewards_MBT=torch.zeros(OBJECTIVES, ROWS, COLUMNS),
        advantages_MBT=advantages_MB[:, :, None] * mask_BT,
    )


def value_loss(values_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """Squared error against the advantages of one objective, as if they were returns."""
    assert batch.advantages_MBT is not None
    old_BT = torch.zeros_like(values_BT)
    return value_loss_sum(values_BT, old_BT, batch.advantages_MBT[objective], batch.response_mask_BT, 100.0)


def build_engine(config: Config, with_critic: bool = False) -> MegatronEngine:
    """An engine over this world."""
    existing = worlds.enter_layout(config.parallel, config.seed)
    resolved = resolved_run(config, existing.layout.world, with_critic=with_critic)
    return MegatronEngine(resolved, pad_id=0, eos_ids=[2], existing=existing)


def local_part(batch: Experience, engine: MegatronEngine) -> Experience:
    """This data rank's rows, with old log-probabilities near the policy's own."""
    import dataclasses

    part = batch.select(torch.arange(ROWS).chunk(engine.layout.data)[engine.layout.data_rank])
    own_BT = engine.logprobs(part, "policy")
    return dataclasses.replace(part, old_logprobs_BT=(own_BT + part.old_logprobs_BT) * part.response_mask_BT)


def run_critic(arguments: dict[str, Any]) -> dict[str, Any]:
    """Critic updates in one layout: the losses, and what the values come to."""
    sections = {**arguments.get("sections", {}), "critic": arguments["critic"]}
    config = make_config(arguments["model"], arguments["layout"], {}, **sections)
    engine = build_engine(config, with_critic=True)
    batch = local_part(global_batch(200), engine)
    losses = [engine.update_critic(batch, value_loss) for _ in range(4)]
    values_MBT = engine.values(batch) * batch.response_mask_BT
    sums = engine.sum_over_data(
        torch.stack([values_MBT.sum((1, 2)), values_MBT.square().sum((1, 2))]).double()
    )
    return {"losses": losses, "values": sums.tolist()}


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, layout, optimizer, sections, steps, and export, a folder for the result;
    perhaps clip_epsilon, prompts to answer before the first step, and folders for the adapter
    (export_adapter) and for a checkpoint (save).

    With ``critic``, a section of the configuration, the critic is run instead.
    """
    if "critic" in arguments:
        return run_critic(arguments)
    config = make_config(
        arguments["model"], arguments["layout"], arguments["optimizer"], **arguments.get("sections", {})
    )
    engine = build_engine(config)
    batch = local_part(global_batch(200), engine)
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    tokens = None
    if "prompts" in arguments:
        greedy = SamplingParameters(8, temperature=0.0)
        tokens = engine.generator.generate(arguments["prompts"], greedy, seed=0).tokens_BT.tolist()
    policy_loss = Ppo(clip_epsilon=arguments.get("clip_epsilon", CLIP_EPSILON))
    reports = [engine.update_policy(batch, policy_loss, aggregator) for _ in range(arguments["steps"])]
    export = Path(arguments["export"])
    engine.export_hf(export)
    if "export_adapter" in arguments:
        engine.export_adapter(Path(arguments["export_adapter"]))
    if "save" in arguments:
        engine.save(Path(arguments["save"]), {})
    return {
        "world": dist.get_world_size(),
        "tokens": tokens,
        "losses": [r.losses for r in reports],
        "gram": [r.gram.tolist() for r in reports],
        "weights": [r.weights.tolist() for r in reports],
        "norm": [r.gradient_norm for r in reports],
        "phases": [list(r.seconds) for r in reports],
        "actual_change": [r.actual_change for r in reports],
        "predicted_norm": [float((r.weights @ r.gram @ r.weights).sqrt()) for r in reports],
    }


def parameters(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of an exported model."""
    return dict(load_file(Path(directory) / "model.safetensors"))
