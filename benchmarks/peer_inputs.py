"""What all contenders of benchmarks/peers.py are given: a model directory and one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peer_jobs import ModelSize
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from gapo_mega.losses import Ppo
from gapo_mega.types import Experience

SEED = 7
loss = Ppo(clip_epsilon=0.1)  # of every contender
NOISE = 0.02  # of the old log-probabilities: ratios near 1, few of them clipped
# The same for every contender. So small that the gradients of all steps of a run are the same to a few
# digits: contenders with different weights go on doing the same work.
LEARNING_RATE = 1e-7
BETAS = (0.9, 0.95)
EPS = 1e-8


def write_random_model(directory: Path, size: ModelSize, length: int) -> None:
    """Write a random Llama in fp32, whose output layer is not tied to the embedding."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def load_model(source: str, attention: str) -> PreTrainedModel:
    """The policy in transformers, fp32, without dropout (training mode has none in Llama either)."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    model.train(False)
    return model


def make_batch(model: PreTrainedModel, sequences: int, length: int, objectives: int) -> Experience:
    """Random prompts and responses of unequal length, with advantages that disagree."""
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = model.config.vocab_size
    tokens_BT = torch.randint(3, vocabulary, (sequences, length), generator=generator)
    prompt_B = torch.randint(max(1, length // 8), max(2, length // 3), (sequences,), generator=generator)
    end_B = torch.randint(length - length // 4, length + 1, (sequences,), generator=generator)
    position_T = torch.arange(length)
    mask_BT = (position_T >= prompt_B[:, None]) & (position_T < end_B[:, None])
    advantages_MB = torch.randn(objectives, sequences, generator=generator)
    advantages_MB[1:] -= 0.5 * advantages_MB[0]
    advantages_MB *= torch.linspace(1.0, 3.0, objectives)[:, None]
    with torch.no_grad():
        own_BT = response_logprobs(model, tokens_BT, mask_BT)
    noise_BT = NOISE * torch.randn(sequences, length, generator=generator)
    return Experience(
        tokens_BT=torch.where(position_T < end_B[:, None], tokens_BT, 0),
        response_mask_BT=mask_BT,
        group_B=torch.arange(sequences),
        old_logprobs_BT=(own_BT + noise_BT) * mask_BT,
        ref_logprobs_BT=torch.zeros(sequences, length),
        scores_MB=advantages_MB,
        token_rewards_MBT=torch.zeros(objectives, sequences, length),
        advantages_MBT=advantages_MB[:, :, None] * mask_BT,
    )


def response_logprobs(model: PreTrainedModel, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Log-probability of every response token [B, T], 0 elsewhere; the softmax at those positions only.

    It indexes by position instead of by mask, because the backward of masked_scatter has no rule under vmap.
    """
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    rows_N, columns_N = mask_BT[:, 1:].nonzero(as_tuple=True)
    targets_N = tokens_BT[rows_N, columns_N + 1]
    values_N = -cross_entropy(logits_BTV[rows_N, columns_N], targets_N, reduction="none")
    zeros_BT = torch.zeros(tokens_BT.shape, device=tokens_BT.device)
    return zeros_BT.index_put((rows_N, columns_N + 1), values_N)


def describe(model: PreTrainedModel, batch: Experience) -> dict[str, Any]:
    """What the figures depend on. The gradient's size is that of fp32."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    return {
        "parameters": parameters,
        "gradient_bytes": 4 * parameters,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
        "response_tokens": int(batch.response_mask_BT.sum()),
    }
