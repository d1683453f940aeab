"""The memory prediction against real tensors and the allocations of real passes, within 5 percent."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from gapo_mega import aggregation
from gapo_mega.config import Config
from gapo_mega.engine.megatron.checkpoint.background import HeldFiles
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.model.build import VOCABULARY_DIVISOR as ENGINE_DIVISOR
from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.measuring.allocation import measure_allocations
from gapo_mega.models.registry import shape_of
from gapo_mega.planning.activations import VOCABULARY_DIVISOR
from gapo_mega.planning.memory import StagePlan, predict
from gapo_mega.types import Experience
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.resolved import resolved_run
from tests.helpers.sampled import random_kept

TOLERANCE = 0.05
MIB = 1 << 20
OBJECTIVES = 3


def build(directory: Path, hf_config: PreTrainedConfig, **sections: Any) -> tuple[Config, MegatronEngine]:
    """An engine over a random model; the objectives and data of its configuration are never used."""
    AutoModelForCausalLM.from_config(hf_config).save_pretrained(directory)
    optimizer = sections.pop("optimizer", {})
    config = check_engine.make_config(str(directory), {}, optimizer, **sections)
    return config, check_engine.build_engine(config)


def longest_batch(config: Config, vocabulary: int) -> Experience:
    """One minibatch of the longest prompts and responses."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    generator = torch.Generator().manual_seed(1)
    zeros_BT = torch.zeros(rows, prompt + response)
    mask_BT = torch.arange(prompt + response).expand(rows, -1) >= prompt
    advantages_MBT = torch.randn(OBJECTIVES, rows, prompt + response, generator=generator) * mask_BT
    tokens_BT = torch.randint(3, vocabulary, zeros_BT.shape, generator=generator)
    cut = config.rollout.top_p < 1
    return Experience(
        tokens_BT=tokens_BT,
        response_mask_BT=mask_BT,
        kept=random_kept(tokens_BT, mask_BT, vocabulary, 0.01)[0] if cut else None,
        group_B=torch.arange(rows),
        old_logprobs_BT=zeros_BT,
        ref_logprobs_BT=zeros_BT,
        scores_MB=advantages_MBT.sum(-1),
        token_rewards_MBT=advantages_MBT,
        advantages_MBT=advantages_MBT,
    )


def tensor_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def optimizer_bytes(engine: MegatronEngine, dtype: str) -> int:
    """Moments, and in bf16 the fp32 parameters that they belong to."""
    state = {p: s for o in engine.policy.optimizer.chained_optimizers for p, s in o.optimizer.state.items()}
    moments = tensor_bytes(t for s in state.values() for t in s.values() if torch.is_tensor(t) and t.dim())
    return moments + (tensor_bytes(state) if dtype == "bf16" else 0)


def assert_near(measured: dict[str, int], plan: StagePlan) -> None:
    predicted = {name: getattr(plan, name) for name in measured}
    wrong = {
        name: f"predicted {predicted[name] / MIB:.2f} MiB, measured {size / MIB:.2f} MiB"
        for name, size in measured.items()
        if not abs(predicted[name] - size) <= TOLERANCE * size
    }
    assert not wrong
    total, found = sum(predicted.values()), sum(measured.values())
    assert abs(total - found) <= TOLERANCE * found


def test_the_meter_counts_what_stands_at_once() -> None:
    earlier = torch.zeros(1000)
    with measure_allocations("cpu") as found:
        first = torch.zeros(1000)  # 4000 bytes
        second = first * 2 + 1  # 4000, and as many in between
        del first, earlier
        kept = torch.zeros(250)
    assert 12000 <= found.peak_bytes <= 12100  # a few bytes for scalars
    assert found.net_bytes == 5000 == tensor_bytes([second, kept])
    with measure_allocations("cpu") as found:
        del second, kept  # an earlier block's memory
        torch.zeros(100)
    assert (found.peak_bytes, found.net_bytes) == (400, 0)


def test_a_release_by_another_thread_is_noticed_when_the_place_is_used_again() -> None:
    addresses: list[int] = []
    with measure_allocations("cpu") as found:
        # Where the next one lies is the C library's affair.
        while len(set(addresses)) == len(addresses) and len(addresses) < 1000:
            box = [torch.zeros(1 << 16)]
            addresses.append(box[0].data_ptr())
            thread = threading.Thread(target=box.clear)
            thread.start()
            thread.join()
    assert len(set(addresses)) < len(addresses), "no place was used again"
    assert found.peak_bytes <= len(set(addresses)) * 4 << 16


def test_the_meter_knows_two_kinds_of_device() -> None:
    with (
        pytest.raises(ValueError, match="device: found meta, accepted: a cpu or cuda device"),
        measure_allocations("meta"),
    ):
        pass


WIDE = {
    "vocab_size": 4000,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
NARROW = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("sizes", "tied", "response", "sections"),
    [
        # One graph for all objectives, two rows and a copy of the parameters. Reduced in place: a thread of
        # gloo's would release the copy that it makes for the distributed optimizer, unseen by the meter.
        (
            WIDE,
            True,
            160,
            {
                "model": {"dtype": "fp32"},
                "gradients": {"forward": "shared", "actual_change": True},
                "optimizer": {"distributed": False},
            },
        ),
        # Two microbatches, and passes for every objective.
        (
            NARROW,
            False,
            260,
            {
                "model": {"dtype": "bf16"},
                "gradients": {"forward": "separate", "store_dtype": "bf16"},
                "micro_batch_size": 1,
            },
        ),
        (NARROW, False, 400, {"model": {"recompute": "full"}, "gradients": {"store": "single"}}),
        # Norms of queries and keys.
        (
            {**WIDE, "head_dim": 32},
            True,
            160,
            {"gradients": {"forward": "shared"}, "optimizer": {"distributed": False}},
        ),
        # Edited logits; without padding, which alone would make the copy.
        (
            {**WIDE, "vocab_size": 4096},
            True,
            200,
            {
                "gradients": {"forward": "separate"},
                "optimizer": {"distributed": False},
                "rollout": {"repetition_penalty": 1.05, "top_p": 0.9},
            },
        ),
        # Logits of 64 of 400 response tokens at a time.
        (
            {**WIDE, "vocab_size": 12000, "num_hidden_layers": 1},
            True,
            200,
            {
                "gradients": {"forward": "separate"},
                "optimizer": {"distributed": False},
                "model": {"logits_chunk": 64},
            },
        ),
        # Adapters, of logits at a time as well.
        (
            {**WIDE, "vocab_size": 12000, "num_hidden_layers": 1},
            True,
            200,
            {
                "gradients": {"forward": "separate"},
                "optimizer": {"distributed": False},
                "model": {"logits_chunk": 64, "lora": {"rank": 8}},
            },
        ),
    ],
    ids=[
        *("shared-fp32", "separate-bf16", "recompute-fp32", "qwen3", "penalty-and-cut"),
        *("chunks", "chunks-and-adapters"),
    ],
)
def test_a_step_takes_what_was_predicted(
    tmp_path: Path, sizes: dict[str, int], tied: bool, response: int, sections: dict[str, Any]
) -> None:
    sections = {
        "micro_batch_size": 2,
        "data": {"source": "unused", "max_prompt_tokens": 48},
        "checkpoint": {"every_steps": 1, "asynchronous": True},
        **sections,
        "rollout": {
            "prompts_per_step": 2,
            "samples_per_prompt": 1,
            "max_new_tokens": response,
            **sections.get("rollout", {}),
        },
    }
    kind = Qwen3Config if "head_dim" in sizes else LlamaConfig
    hf_config = kind(**sizes, max_position_embeddings=1024, tie_word_embeddings=tied, eos_token_id=2)
    config, engine = build(tmp_path, hf_config, **sections)
    # What an earlier test left there would not be allocated again.
    parallel_state.get_global_memory_buffer().buffer.clear()
    try:
        shape = shape_of(hf_config)
        (plan,) = predict(resolved_run(config, shape=shape)).stages
        batch = longest_batch(config, shape.vocab)
        with measure_allocations(device()) as found:
            engine.update_policy(batch, check_engine.loss, aggregation.build("gapo", p=1))
        with measure_allocations("cpu") as save:
            held = HeldFiles(tmp_path / "checkpoint")
            engine.save(tmp_path / "checkpoint", {}, held)
        model, reference = engine.policy.model, engine.reference
        assert_near(
            {
                "parameters": tensor_bytes(model.parameters()),
                "gradients": tensor_bytes(buffer.grad_data for buffer in model.buffers),
                "optimizer": optimizer_bytes(engine, config.model.dtype),
                "objective_rows": engine.gradients.row_bytes,
                "reference": 0 if reference is None else tensor_bytes(reference.model.parameters()),
                "activations": found.peak_bytes,
                "held_checkpoint": save.net_bytes,
            },
            plan,
        )
        assert plan.activations > 20 * MIB  # large enough to mean something
    finally:
        worlds.leave()


def test_the_plan_pads_the_vocabulary_as_the_engine_does() -> None:
    assert VOCABULARY_DIVISOR == ENGINE_DIVISOR
