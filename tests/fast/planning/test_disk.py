"""The predicted disk, against the bytes of a torch model and of torch's own optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gapo_mega.config import CheckpointConfig, Config, OptimizerConfig
from gapo_mega.models import shape_of
from gapo_mega.planning.disk import predict_disk, predict_training
from gapo_mega.planning.memory import stage_parameters
from tests.helpers.resolved import resolved_run

LLAMA = LlamaConfig(
    vocab_size=256, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
COUNT = stage_parameters(shape_of(LLAMA), 1, 1, 0)


def of_torch(dtype: torch.dtype, kind: str) -> tuple[int, int]:
    """Bytes of the model, and of it with its optimizer's state over fp32 main parameters."""
    model = LlamaForCausalLM(LLAMA).to(dtype)
    main = LlamaForCausalLM(LLAMA).float()
    optimizers: dict[str, Any] = {
        "adam": torch.optim.Adam(main.parameters()),
        "sgd": torch.optim.SGD(main.parameters(), momentum=0.9),
    }
    for parameter in main.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[kind].step()
    weights = sum(p.nbytes for p in model.parameters())
    state = sum(
        value.nbytes
        for entry in optimizers[kind].state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
    copies = sum(p.nbytes for p in main.parameters()) if dtype == torch.bfloat16 else 0
    return weights, weights + state + copies


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "adam"), ("bf16", "adam"), ("fp32", "sgd")])
def test_a_checkpoint_has_the_bytes_of_model_and_optimizer(dtype: str, kind: str) -> None:
    sgd = {"momentum": 0.9, "distributed": False} if kind == "sgd" else {}
    optimizer = OptimizerConfig.model_validate({"name": kind, **sgd})
    settings = CheckpointConfig(every_steps=1)
    plan = predict_disk(COUNT, dtype, optimizer, settings, steps=10)
    export, checkpoint = of_torch(torch.bfloat16 if dtype == "bf16" else torch.float32, kind)
    assert (plan.export, plan.checkpoint) == (export, checkpoint)
    assert plan.needed == 3 * checkpoint + export


@pytest.mark.parametrize(
    ("settings", "steps", "at_once"),
    [
        ({"every_steps": 5, "keep": 2}, 100, 3),  # two that stay while the next is written
        ({"every_steps": 5, "keep": 2}, 10, 2),
        ({"every_steps": 5, "keep": 9}, 11, 3),  # the last step has one, too
        ({"save_final": True}, 100, 1),
        ({}, 100, 0),
    ],
)
def test_how_many_are_there_at_once(settings: dict[str, Any], steps: int, at_once: int) -> None:
    plan = predict_disk(COUNT, "fp32", OptimizerConfig(), CheckpointConfig(**settings), steps)
    assert plan.at_once == at_once


def test_critics_and_the_best_one_count() -> None:
    sections: dict[str, Any] = {
        "output_dir": "o",
        "steps": 50,
        "model": {"path": "m"},
        "data": {"source": "s"},
        "objectives": [{"name": "a"}, {"name": "b"}],
        "checkpoint": {"every_steps": 10, "best": "a", "export_hf": False},
        "evaluation": {"every_steps": 10},
    }
    config, shape = Config.model_validate(sections), shape_of(LLAMA)
    alone = predict_training(resolved_run(config, shape=shape, with_critic=False))
    beside = predict_training(resolved_run(config, shape=shape, with_critic=True))
    assert alone.at_once == 4 and alone.export == 0 and alone.checkpoint == 12 * COUNT
    # A critic is the model without its output layer, and two heads with a bias: fp32 and two moments each.
    critic = COUNT - 256 * 48 + 2 * (48 + 1)
    assert beside.checkpoint == 12 * (COUNT + critic)


def test_adapters_alone_have_optimizer_state() -> None:
    """Of a checkpoint, beside the frozen weights: rank 3 on q (48 to 48) and down (96 to 48), twice."""
    lora = {"rank": 3, "target_modules": ["q_proj", "down_proj"]}
    settings: dict[str, Any] = {
        "output_dir": "o",
        "model": {"path": "m", "lora": lora},
        "data": {"source": "s"},
        "objectives": [{"name": "a"}],
    }
    plan = predict_training(resolved_run(Config.model_validate(settings), shape=shape_of(LLAMA)))
    adapters = 2 * 3 * (48 + 48 + 96 + 48)
    assert plan.checkpoint == 4 * COUNT + 12 * adapters
