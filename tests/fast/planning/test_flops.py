"""FLOPs counts against PyTorch's own counter on a transformers Llama."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from gapo_mega.config.lora import LoraConfig
from gapo_mega.config.strategies import PassCount
from gapo_mega.models import shape_of
from gapo_mega.models.adapters import layer_parameters
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning import flops as throughput
from gapo_mega.planning.flops import TransformerShape
from gapo_mega.planning.memory import stage_parameters

SHAPE = TransformerShape(layers=2, hidden=48, ffn=80, heads=6, kv_groups=2, head_dim=8, outputs=101)


def llama(shape: TransformerShape) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_groups,
            head_dim=shape.head_dim,
            vocab_size=shape.outputs,
            attn_implementation="eager",
        )
    )


@pytest.mark.parametrize("length", [1, 7, 32])
@pytest.mark.parametrize("kv_groups", [1, 6])
def test_forward_equals_the_flop_counter(length: int, kv_groups: int) -> None:
    shape = TransformerShape(2, 48, 80, 6, kv_groups, 8, 101)
    with FlopCounterMode(display=False) as counter:
        llama(shape)(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    # The eager attention masks instead of skipping, hence causal=False.
    expected = throughput.forward_flops(shape, length, causal=False)
    assert counter.get_total_flops() == expected


def test_backward_is_twice_the_forward() -> None:
    length = 16
    with FlopCounterMode(display=False) as counter:
        llama(SHAPE)(torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    forward = throughput.forward_flops(SHAPE, length, causal=False)
    assert counter.get_total_flops() == 3 * forward


def test_adapters_add_their_products_and_spare_frozen_weights_gradients() -> None:
    lora = LoraConfig(rank=4)
    model = get_peft_model(llama(SHAPE), PeftConfig(r=4, target_modules=list(lora.targets)))
    model.enable_input_require_grads()  # as the engine's embedding
    sizes = {"hidden": 48, "ffn": 80, "heads": 6, "kv_groups": 2, "head_dim": 8}
    whole = ModelShape("llama", 2, **sizes, vocab=101, tied=False, rope_theta=1e4, norm_eps=1e-5,
                       qkv_bias=False, max_positions=64)  # fmt: skip
    adapters = layer_parameters(whole, lora)
    assert adapters * 2 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape, length = dataclasses.replace(SHAPE, adapters=adapters), 16
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    forward = throughput.forward_flops(shape, length, causal=False)
    assert counter.get_total_flops() == forward + throughput.backward_flops(shape, length, causal=False)
    count = throughput.step_flops(shape, [(8, 8)], PassCount(1, 1))
    without = throughput.step_flops(SHAPE, [(8, 8)], PassCount(1, 1))
    assert count.reference == without.reference and count.rollout > without.rollout
    assert count.update < without.update


def test_causal_attention_counts_visible_pairs() -> None:
    length = 9
    visible = int(torch.ones(length, length).tril().sum())
    full, causal = (throughput.attention_flops(SHAPE, length, causal) for causal in (False, True))
    assert causal * length**2 == full * visible


def test_generation_equals_the_flop_counter_token_by_token() -> None:
    """With a cache, one query at a time sees exactly the causal pairs; logits of the last position only."""
    model, prompt, response = llama(SHAPE), 1, 5
    tokens = torch.zeros(1, prompt, dtype=torch.long)
    cache = None
    with FlopCounterMode(display=False) as counter:
        for _ in range(response):
            out = model(tokens[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens = torch.cat([tokens, tokens[:, -1:]], dim=1)
    expected = throughput.generation_flops(SHAPE, prompt, response)
    assert counter.get_total_flops() == expected


def test_a_step_is_made_of_its_passes() -> None:
    lengths = [(4, 8), (6, 2)]
    forward = sum(throughput.forward_flops(SHAPE, p + r) for p, r in lengths)
    plain = throughput.step_flops(SHAPE, lengths, PassCount(3, 3), ppo_epochs=2)
    assert (plain.reference, plain.update, plain.recompute) == (forward, 18 * forward, 0)
    assert plain.hardware == plain.model
    full = throughput.step_flops(SHAPE, lengths, PassCount(3, 3), ppo_epochs=2, recompute="full")
    assert full.model == plain.model
    assert full.recompute == 6 * (forward - 2 * 20 * SHAPE.hidden * SHAPE.outputs)
    # A chunk's logits are computed again in every backward.
    kinds: list[throughput.Recompute] = ["none", "full"]
    for recompute in kinds:
        whole, chunks = (
            throughput.step_flops(SHAPE, lengths, PassCount(1, 3), recompute=recompute, chunked=chunked)
            for chunked in (False, True)
        )
        assert chunks.model == whole.model
        assert chunks.recompute - whole.recompute == 3 * 2 * 20 * SHAPE.hidden * SHAPE.outputs
    critic = TransformerShape(2, 48, 80, 6, 2, 8, 3)
    with_critic = throughput.step_flops(SHAPE, lengths, PassCount(1, 3), critic=critic)
    assert with_critic.update == 7 * forward
    assert with_critic.critic == 4 * sum(throughput.forward_flops(critic, p + r) for p, r in lengths)


def test_mfu() -> None:
    assert throughput.mfu(6e15, 2.0, 3, 2e15) == 0.5
    with pytest.raises(ValueError, match="seconds"):
        throughput.mfu(1.0, 0.0, 1, 1.0)


def test_a_token_pays_for_the_experts_that_it_goes_through() -> None:
    """Qwen3-30B-A3B: its card says 3.3 B active parameters, of which the embedding look-up is no product."""
    shape = shape_of(
        Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
        )
    )
    sizes = TransformerShape.of(shape, shape.vocab)
    assert sizes.matmul_parameters + 151936 * 2048 == pytest.approx(3.3e9, rel=0.02)
    assert stage_parameters(shape, 1, 1, 0) == pytest.approx(30.5e9, rel=0.01)
