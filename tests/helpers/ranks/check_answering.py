"""Models that answer, in one layout; the test compares with transformers and with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gapo_mega.config import ModelConfig, ParallelConfig, RolloutConfig
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.answering import MegatronAnswers
from gapo_mega.models import shape_of
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.location import companions_of
from gapo_mega.planning.setups import AnsweringSetup, LocalModel
from gapo_mega.types import TokenBatch
from tests.helpers.ranks import worlds

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 8]]
TEMPERATURE = 0.7


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: layout, and the models of each turn: policy and reference (or None)."""
    layout = ParallelConfig.model_validate(arguments["layout"])
    world = worlds.enter_layout(layout)
    engine: MegatronAnswers | None = None
    turns = []
    for policy, reference in arguments["turns"]:
        setup = AnsweringSetup(
            policy=_model(policy),
            reference=None if reference is None else _model(reference),
            model=ModelConfig(path="unused"),
            parallel=layout,
            rollout=RolloutConfig(temperature=TEMPERATURE, batch_size=3),
            micro_batch=3,
            seed=1,
            pad_id=0,
            eos_ids=[1],
        )
        if engine is None:
            engine = MegatronAnswers(setup, existing=world)
        else:
            engine.take(setup)
        greedy = engine.generator.generate(PROMPTS, SamplingParameters(6, temperature=0.0), seed=1)
        batch = TokenBatch(greedy.tokens_BT, greedy.response_mask_BT)
        turn = {"tokens": greedy.tokens_BT, "mask": greedy.response_mask_BT}
        turn["policy"] = engine.logprobs(batch, "policy")
        if reference is not None:
            turn["reference"] = engine.logprobs(batch, "reference")
        turns.append({name: tensor.tolist() for name, tensor in turn.items()})
    return {"turns": turns}


def _model(directory: str) -> LocalModel:
    source = Path(directory)
    return LocalModel(source, shape_of(read_config(companions_of(source))))
