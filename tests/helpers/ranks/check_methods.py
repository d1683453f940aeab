"""Whole trainings of a few steps with a method by its name, on the process groups of earlier ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from gapo_mega.data.prompts import load_prompts
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.planning.methods import load
from gapo_mega.runs.preflight import resolve
from gapo_mega.runs.trainer import Trainer
from tests.helpers.ranks import worlds


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: config, a file, overrides, and the layout where it is not one rank a replica; returns
    the log's lines and what the parameters are.

    With ``against``, other overrides, it trains again with those; ``apart`` is then the largest
    difference of parameters, over their largest size, on rank 0.
    """
    lines, trained = _train(arguments["config"], arguments["overrides"])
    if "against" not in arguments:
        return {"lines": lines}
    _, others = _train(arguments["config"], arguments["against"])
    size = max(float(p.abs().max()) for p in trained)
    apart = max(float((p - q).abs().max()) for p, q in zip(trained, others, strict=True))
    return {"lines": lines, "apart": apart / size}


def _train(path: str, overrides: list[str]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    config = load(path, overrides)
    existing = worlds.enter(config.parallel.tensor, config.parallel.pipeline, config.seed)
    resolved = resolve(config, existing.layout.world)
    tokenizer = read_tokenizer(Path(config.model.path))
    train, held_out = load_prompts(config.data, tokenizer, config.seed)
    end = int(tokenizer.eos_token_id)
    engine = MegatronEngine(resolved, pad_id=end, eos_ids=[end], existing=existing)
    trainer = Trainer(resolved, engine, tokenizer, train, held_out, with_report=False)
    assert trainer.run()
    parameters = [p.detach().clone() for p in engine.policy.parameters()]
    log = Path(config.output_dir) / "metrics.jsonl"
    lines = log.read_text().splitlines() if existing.layout.is_main else []
    return [json.loads(line) for line in lines], parameters
