"""How many positions' logits a training pass has in memory at once."""

from __future__ import annotations

from typing import Literal

from gapo_mega.config import Config
from gapo_mega.models.shape import ModelShape

CHUNK = 1024  # response tokens; below some hundred, products of the output layer get slow


def most_response_tokens(config: Config) -> int:
    """Response tokens that a microbatch may have."""
    response = config.rollout.max_new_tokens
    if config.micro_batch_tokens is None:
        return config.micro_batch_size * response
    return config.micro_batch_tokens * response // (response + 1)  # a prompt has a token


def logits_chunk(config: Config, shape: ModelShape) -> int:
    """Response tokens of a microbatch whose logits are in memory at once; 0: all."""
    model = config.model
    return chunk_of(model.logits_chunk, most_response_tokens(config), shape, frozen=model.lora is not None)


def chunk_of(chosen: int | Literal["auto"], tokens: int, shape: ModelShape, frozen: bool) -> int:
    """``chosen``, or what ``auto`` makes of microbatches of ``tokens`` tokens with logits; 0: all at once.

    ``frozen``: the output layer is not trained.

    N tokens in chunks of C save N - C rows of V logits. They cost a second gradient of the output layer, of
    ``hidden`` rows of V numbers, because every chunk has one and their sum waits for it; a frozen layer has
    none.
    """
    if chosen != "auto":
        return chosen
    cost = 0 if frozen else shape.hidden
    return CHUNK if tokens > CHUNK + cost else 0
