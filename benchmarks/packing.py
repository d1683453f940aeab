"""Packed rows against rows with padding: tokens computed, CPU seconds and memory of an update.

    python -m benchmarks.packing FOLDER

Random responses whose lengths vary (log-normal, the longest eight times the median), to a random model in
FOLDER, in one process. Each kind's turn comes after the other's, and the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gapo_mega import aggregation, losses
from gapo_mega.config import Config
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.measuring.allocation import measure_allocations
from gapo_mega.runs.preflight import resolve
from gapo_mega.types import Experience

PROMPT, RESPONSE, SEQUENCES, OBJECTIVES = 32, 256, 64, 3
SIZES = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip
# Rows of as many tokens: 8 x 288 with padding at most.
KINDS: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_size": 8},
    "packed": {"micro_batch_tokens": 8 * (PROMPT + RESPONSE)},
}


def sampled(seed: int = 1) -> Experience:
    """Prompts of 8 to 32 tokens, responses of 1 to 256."""
    generator = torch.Generator().manual_seed(seed)
    prompt_B = torch.randint(8, PROMPT + 1, (SEQUENCES,), generator=generator)
    normal_B = torch.randn(SEQUENCES, generator=generator)
    response_B = (RESPONSE / 8 * normal_B.mul(0.9).exp()).long().clamp(1, RESPONSE)
    position_T = torch.arange(PROMPT + RESPONSE)
    length_B1 = (prompt_B + response_B)[:, None]
    mask_BT = (position_T >= prompt_B[:, None]) & (position_T < length_B1)
    advantages_MB = torch.randn(OBJECTIVES, SEQUENCES, generator=generator)
    size = (SEQUENCES, PROMPT + RESPONSE)
    return Experience(
        tokens_BT=torch.randint(0, SIZES["vocab_size"], size, generator=generator),
        response_mask_BT=mask_BT,
        group_B=torch.arange(SEQUENCES),
        old_logprobs_BT=torch.full(size, -9.0) * mask_BT,
        ref_logprobs_BT=torch.zeros(size),
        scores_MB=advantages_MB,
        token_rewards_MBT=torch.zeros(OBJECTIVES, *size),
        advantages_MBT=advantages_MB[:, :, None] * mask_BT,
    )


def engine_of(
    model: Path, forward: str, kind: dict[str, Any], existing: groups.Groups | None
) -> MegatronEngine:
    """An engine with an optimizer that moves nothing."""
    config = Config.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": str(model)},
            "data": {"source": "unused", "max_prompt_tokens": PROMPT},
            "rollout": {
                "prompts_per_step": SEQUENCES // 8,
                "samples_per_prompt": 8,
                "max_new_tokens": RESPONSE,
            },
            "objectives": [
                {"name": f"o{i}", "function": "gapo_mega.demo.rewards:plain"} for i in range(OBJECTIVES)
            ],
            "optimizer": {"name": "sgd", "distributed": False, "lr": 1e-30},
            "gradients": {"forward": forward},
            **kind,
        }
    )
    return MegatronEngine(resolve(config, 1), pad_id=0, eos_ids=[2], existing=existing)


def measure(model: Path, forward: str, rounds: int) -> dict[str, tuple[float, float, int]]:
    """Of every kind: padding, CPU seconds of an update, peak of allocated bytes above what was there."""
    # Nothing is clipped, so that one pass is enough.
    loss, aggregator, batch = losses.Ppo(clip_epsilon=100.0), aggregation.build("gapo"), sampled()
    engines: dict[str, MegatronEngine] = {}
    existing = None
    for name, kind in KINDS.items():
        engines[name] = engine_of(model, forward, kind, existing)
        existing = engines[name].groups
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    found = {}
    for name, engine in engines.items():
        engine.update_policy(batch, loss, aggregator)
        with measure_allocations(engine.device) as allocated:
            report = engine.update_policy(batch, loss, aggregator)
        found[name] = report.padding, allocated.peak_bytes
    for _ in range(rounds):
        for name, engine in engines.items():
            started = time.process_time()
            engine.update_policy(batch, loss, aggregator)
            seconds[name].append(time.process_time() - started)
    groups.shutdown()
    return {name: (found[name][0], statistics.median(seconds[name]), found[name][1]) for name in engines}


def main() -> int:
    """Print a table, by forward and kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = arguments.folder / "model"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(model)
    print("forward   kind    tokens computed  CPU s    peak MiB")
    for forward in ("one_pass", "separate"):
        for name, (padding, time_s, peak) in measure(model, forward, arguments.rounds).items():
            print(f"{forward:9} {name:7} {padding:15.2f}  {time_s:7.2f}  {peak / 2**20:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
