"""The ceiling of a step, by hand for one layout; and what data sheets say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from gapo_mega.config import Config, ParallelConfig
from gapo_mega.models import shape_of
from gapo_mega.planning import devices, speed
from gapo_mega.planning.resolved import ResolvedRun
from tests.helpers.resolved import resolved_run

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
WEIGHTS = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336) + 4096 * 128256


def run(world: int = 16, **sections: Any) -> ResolvedRun:
    base: dict[str, Any] = {
        "output_dir": "o",
        "micro_batch_size": 4,
        "model": {"path": "m", "dtype": "bf16"},
        "data": {"source": "s", "max_prompt_tokens": 160},
        "rollout": {
            "prompts_per_step": 64,
            "samples_per_prompt": 32,
            "max_new_tokens": 900,
            "batch_size": 256,
        },
        "objectives": [{"name": "a"}, {"name": "b"}],
        "parallel": {"pipeline": 2},
        "advantages": {"name": "grpo"},
        "algorithm": {"old_logprobs": "generator"},
    }
    return resolved_run(Config.model_validate(base | sections), world, shape=shape_of(LLAMA_8B))


@pytest.mark.parametrize(
    ("name", "tera", "tera_bytes"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 2.039),
        ("NVIDIA A100-SXM4-40GB", 312, 1.555),
        ("NVIDIA H100 80GB HBM3", 989.5, 3.35),
        ("NVIDIA H100 PCIe", 756, 2.0),
        ("NVIDIA H200", 989.5, 4.8),
        ("NVIDIA B200", 2250, 8.0),
        ("NVIDIA GB200", 2500, 8.0),
    ],
)
def test_known_devices(name: str, tera: float, tera_bytes: float) -> None:
    found = devices.known(name)
    assert found is not None
    assert (found.peak_flops, found.bandwidth) == pytest.approx((tera * 1e12, tera_bytes * 1e12))


def test_unknown_devices() -> None:
    assert devices.known("NVIDIA GeForce RTX 4090") is None
    assert devices.known("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert all(devices.known(name) for name in devices.NAMES)


def test_a_step_by_hand() -> None:
    """2048 sequences of 160 + 900 tokens on 16 H100, pipeline 2, data parallel 8, 64 microbatches a rank."""
    found = speed.ceiling(run(), "H100")
    pairs = 1060 * 1061 / 2
    forward = 2048 * (2 * 1060 * WEIGHTS + 4 * 32 * 4096 * pairs)
    bubble = 1 + 1 / (2048 / 8 / 4)
    rate = 16 * 989.5e12 * speed.UTILISATION
    assert found.phases["log-probabilities"] == pytest.approx(forward * bubble / rate, rel=1e-9)
    assert found.phases["update"] == pytest.approx(3 * forward * bubble / rate, rel=1e-9)  # one pass
    assert set(found.phases) == {"rollout", "log-probabilities", "update"}
    # A rank samples its 256 sequences together: weights and cached keys and values, once a token.
    cached = 256 * (160 + 450) * 2 * 32 * 8 * 128 * 2
    token = (2 * WEIGHTS + cached) / (3.35e12 * 0.7)
    prefill = 256 * 2 * 160 * (WEIGHTS - 4096 * 128256) / (989.5e12 * speed.UTILISATION)
    assert found.phases["rollout"] == pytest.approx(900 * token + prefill, rel=1e-9)
    expected = 2048 * 1060 / 16 / sum(found.phases.values())
    assert found.tokens_per_second_per_device == pytest.approx(expected)
    assert f"at most {expected:.0f} tokens/s/GPU on 16 x H100, with 160 tokens a prompt" in found.line()


def test_what_makes_a_step_longer() -> None:
    rollout = run().config.rollout.model_dump()
    base = speed.ceiling(run(), "H100")
    in_turns = speed.ceiling(run(rollout=rollout | {"batch_size": 64}), "H100")
    assert in_turns.phases["rollout"] > 2 * base.phases["rollout"]  # weights are read four times
    whole = speed.ceiling(run(model={"path": "m", "dtype": "bf16", "recompute": "full"}), "H100")
    assert 1.2 < whole.phases["update"] / base.phases["update"] < 4 / 3  # the output layer is not repeated
    # But it is where logits come in chunks: of the three products of a pass, one more.
    chunks = speed.ceiling(run(model={"path": "m", "dtype": "bf16", "logits_chunk": 1024}), "H100")
    pairs = 4 * 32 * 4096 * 1061 / 2
    share = 2 * 4096 * 128256 / (2 * WEIGHTS + pairs)
    assert chunks.phases["update"] / base.phases["update"] == pytest.approx(1 + share / 3, rel=1e-9)
    assert speed.ceiling(run(), "H200").phases["rollout"] < base.phases["rollout"]
    short = speed.ceiling(run(), "H100", 160, 450)
    # Half the tokens with a shorter context each.
    assert short.phases["rollout"] < base.phases["rollout"] / 2 and short.lengths == speed.Lengths(160, 450)


def test_a_token_reads_the_experts_that_any_sequence_chooses() -> None:
    """Against the mean over draws of k of E experts by each of n tokens."""
    shape = shape_of(MixtralConfig(num_local_experts=16, num_experts_per_tok=2))
    mlp, layers = 3 * 4096 * 14336, 32
    others = layers * (4096 * (4096 + 1024 + 1024 + 4096) + 16 * 4096) + 4096 * shape.vocab
    generator = torch.Generator().manual_seed(0)

    def touched(tokens: int) -> float:
        choices = torch.rand(2000, tokens, 16, generator=generator).argsort(dim=-1)[..., :2].flatten(1)
        return sum(len(set(draw)) for draw in choices.tolist()) / 2000

    for parallel, together, tokens in [
        ({}, 1, 1),
        ({}, 8, 8),
        ({"tensor": 2, "sequence_parallel": True}, 8, 8),
        ({"expert": 4}, 2, 8),  # tokens of four data ranks
        ({"tensor": 4, "sequence_parallel": True, "expert": 2, "expert_tensor": 1}, 16, 8),
    ]:
        layout = ParallelConfig.model_validate(parallel)
        read = speed.weights_read(shape, layout, together) - others / layout.tensor
        # 2000 draws, whose numbers differ by 1.2: the mean is good to 0.03 of some 10.
        assert read / (layers * mlp) * layout.sharing == pytest.approx(touched(tokens), rel=0.01)
    # One token alone reads what is active, and a large batch reads everything.
    dense, whole = ParallelConfig(), layers * 16 * mlp + others
    assert speed.weights_read(shape, dense, 1) == pytest.approx(others + layers * 2 * mlp, rel=1e-12)
    assert speed.weights_read(shape, dense, 256) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("together", [256, 64])
def test_ahead_takes_the_longer_of_rollout_and_training(together: int) -> None:
    """On twice as many devices: the servers' are their own."""
    rollout = run().config.rollout.model_dump() | {"backend": "vllm", "batch_size": together}
    in_turn = speed.ceiling(run(rollout=rollout), "H100")
    ahead = speed.ceiling(run(rollout=rollout | {"ahead": 1}), "H100")
    assert ahead.phases == in_turn.phases
    drawn = ahead.phases["rollout"]
    trained = ahead.phases["log-probabilities"] + ahead.phases["update"]
    assert (drawn > trained) == (together == 64)
    assert (in_turn.seconds, ahead.seconds) == pytest.approx((drawn + trained, max(drawn, trained)))
    assert (in_turn.devices, ahead.devices) == (16, 32)
    expected = 2048 * 1060 / 32 / max(drawn, trained)
    assert ahead.tokens_per_second_per_device == pytest.approx(expected)
    assert "on 32 x H100 (half of them for the servers)" in ahead.line()
    assert f"{max(drawn, trained):.1f} s a step" in ahead.line()
    assert ahead.as_dict()["ceiling"]["seconds_per_step"] == ahead.seconds
