"""Score models and supervised training in one layout; the test compares with transformers and one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from gapo_mega.config.lora import LoraConfig
from gapo_mega.data.encoding import chat_batch, pair_batch
from gapo_mega.engine.base import SupervisedSetup
from gapo_mega.engine.megatron.checkpoint.weights import head_if_any
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.engine.megatron.score import ScoreModel
from gapo_mega.engine.megatron.supervised import ChatEngine, PairEngine, SupervisedModel
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.types import TokenBatch
from tests.helpers.ranks import worlds

PAD = 0
STEPS = 3


def conversations(count: int = 13) -> list[list[int]]:
    """Token ids of different lengths; some end in the pad token, as texts of some templates do."""
    generator = torch.Generator().manual_seed(5)
    rows: list[list[int]] = []
    for i in range(count):
        length = int(torch.randint(2, 20, (), generator=generator))
        row = torch.randint(3, 101, (length,), generator=generator).tolist()
        rows.append([*row, PAD, PAD] if i % 4 == 0 else row)
    return rows


def pairs(step: int, count: int = 8) -> list[tuple[list[int], list[int]]]:
    """Pairs that differ from step to step; the chosen one has more small ids."""
    generator = torch.Generator().manual_seed(step)
    found: list[tuple[list[int], list[int]]] = []
    for _ in range(count):
        lengths = torch.randint(3, 17, (2,), generator=generator).tolist()
        chosen = torch.randint(3, 50, (lengths[0],), generator=generator).tolist()
        found.append((chosen, torch.randint(40, 101, (lengths[1],), generator=generator).tolist()))
    return found


def chats(step: int, count: int = 8) -> list[tuple[list[int], list[bool]]]:
    """Chats with a mask that begins late and has a hole."""
    return [(chosen, [2 <= i != 4 for i in range(len(chosen))]) for chosen, _ in pairs(step, count)]


def batch_of(kind: str, step: int, data_rank: int, data: int) -> TokenBatch:
    share = 8 // data
    own = slice(data_rank * share, (data_rank + 1) * share)
    if kind == "chats":
        return chat_batch(chats(step)[own], PAD)
    return pair_batch(pairs(step)[own], PAD)


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: kind (score, pairs, chats), model, layout, and export for the trained ones.

    ``lora``: settings of adapters, which are exported, too.
    """
    layout = ParallelConfig.model_validate(arguments["layout"])
    world = worlds.enter_layout(layout)
    model = Path(arguments["model"])
    if arguments["kind"] == "score":
        settings = ModelConfig(path=str(model))
        with megatron_device():
            scorer = ScoreModel(model, settings, layout, world, micro_batch=4, offload=True)
        return {"scores": scorer(conversations())}
    return _train(arguments, layout, world, model)


def _train(arguments: dict[str, Any], layout: ParallelConfig, world: Groups, model: Path) -> dict[str, Any]:
    kind = arguments["kind"]
    shape = shape_of(HFDirectory(model).config)
    classifier = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    setup = SupervisedSetup(
        shape=shape,
        source=model,
        model=ModelConfig(path=str(model)),
        parallel=layout,
        optimizer=OptimizerConfig(lr=1e-3, schedule="constant", warmup_fraction=0),
        total_steps=STEPS,
        micro_batch=4 if kind == "pairs" else 2,
        seed=1,
        config=classifier if kind == "pairs" else {},
        lora=LoraConfig.model_validate(arguments["lora"]) if "lora" in arguments else None,
    )
    engine: SupervisedModel
    if kind == "pairs":
        engine = PairEngine(setup, head=head_if_any(model), center=0.01, pad_id=PAD, existing=world)
    else:
        engine = ChatEngine(setup, existing=world)
    updates = []
    for step in range(STEPS):
        batch = batch_of(kind, step, world.layout.data_rank, world.layout.data)
        updates.append(engine.update(batch))
    measured: Tensor = engine.measure(batch_of(kind, 99, 0, 1))
    export = Path(arguments["export"])
    engine.export_hf(export)
    if setup.lora is not None:
        engine.export_adapter(export.with_name(export.name + "-adapter"))
    engine.save(export.with_name(export.name + "-checkpoint"), {})
    dist.barrier()
    return {
        "losses": [update.loss for update in updates],
        "norms": [update.gradient_norm for update in updates],
        "right": [update.right for update in updates],
        "measured": measured.tolist(),
    }
