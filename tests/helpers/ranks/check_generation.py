"""Generation in one layout: tokens, log-probabilities, and whether all ranks got the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.generation.generate import MegatronGenerator
from gapo_mega.engine.megatron.model import build
from gapo_mega.engine.megatron.model.forward import forward_only
from gapo_mega.engine.megatron.model.logprobs import Distribution, Wanted
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.types import Generation, TokenBatch
from tests.helpers.generating import make_unknown
from tests.helpers.ranks import worlds

LENGTHS = (6, 1, 11, 4, 6, 9, 2)


def prompts_of(vocabulary: int) -> list[list[int]]:
    """Different lengths, one of a single token, one prompt twice."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts[4] = prompts[0]
    return prompts


def tensors_of(generation: Generation) -> list[torch.Tensor]:
    """All of them, those of kept tokens included."""

    def tensors(value: Any) -> list[torch.Tensor]:
        if value is None:
            return []
        return (
            [value] if isinstance(value, torch.Tensor) else [one for each in value for one in tensors(each)]
        )

    return tensors(dataclasses.astuple(generation))


def training_logprobs(
    chunks: Sequence[torch.nn.Module],
    generation: Generation,
    distribution: Distribution,
    world: groups.Groups,
) -> Any:
    """What the training forward says of the sampled tokens: [B, T] on every rank."""

    def output_of(policy_BT: torch.Tensor, part: TokenBatch) -> torch.Tensor:
        return policy_BT.cpu()

    batch = TokenBatch(generation.tokens_BT, generation.response_mask_BT, kept=generation.kept)
    with megatron_device():
        parts = forward_only(chunks, [batch], output_of, policy=Wanted(distribution))
    return world.from_last_stage(parts[0] if parts else torch.zeros(generation.tokens_BT.shape))


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model (a folder), layout, batch_size, eos_ids, and runs, a list of sampling parameters.

    ``megatron_layers``: pipeline stages that our decoder is not to know. ``apart``: every data rank has
    prompts and a seed of its own.

    Gives one entry per run: ``tokens``, ``mask``, ``logprobs`` and ``finished`` as nested lists,
    ``same`` (all ranks of the world, or of every replica, agree), ``logprob_error`` against the training
    forward, the largest of all ranks, and ``everywhere``, the tokens of every data rank.
    """
    directory = Path(arguments["model"])
    layout = ParallelConfig.model_validate(arguments["layout"])
    world = worlds.enter_layout(layout)
    shape = shape_of(HFDirectory(directory).config)
    with megatron_device():
        chunks = build.build_chunks(shape, ModelConfig(path=str(directory)), layout)
        for chunk in chunks:
            weights.load_hf(chunk, shape, directory)
    if world.layout.pipeline_rank in arguments["megatron_layers"]:
        for chunk in chunks:
            make_unknown(chunk)
    generator = MegatronGenerator(
        chunks,
        world,
        vocabulary=shape.vocab,
        pad_id=0,
        eos_ids=arguments["eos_ids"],
        batch_size=arguments["batch_size"],
    )
    prompts, seed = prompts_of(shape.vocab), 4
    if arguments.get("apart"):
        here, data = world.layout.data_rank, world.layout.data
        prompts, seed = prompts[here::data][: len(prompts) // data], seed + here
    results: list[dict[str, Any]] = []
    for parameters in arguments["runs"]:
        sampling = SamplingParameters(**parameters)
        generation = generator.generate(prompts, sampling, seed)
        assert all(chunk.training for chunk in chunks)
        expected_BT = training_logprobs(chunks, generation, Distribution.of(shape.vocab, sampling), world)
        alike = dist.group.WORLD if not arguments.get("apart") else world.replica
        everywhere: list[Any] = [None] * dist.get_world_size(alike)
        dist.all_gather_object(everywhere, tensors_of(generation), group=alike)
        same = all(
            torch.equal(mine, theirs)
            for other in everywhere
            for mine, theirs in zip(tensors_of(generation), other, strict=True)
        )
        error = float((generation.logprobs_BT - expected_BT).abs().max())
        results.append(
            {
                "tokens": generation.tokens_BT.tolist(),
                "mask": generation.response_mask_BT.tolist(),
                "logprobs": generation.logprobs_BT.tolist(),
                "finished": generation.finished_B.tolist(),
                "same": bool(world.sum_over_data(torch.tensor(float(same))) == world.layout.data),
                "logprob_error": max(world.gather_over_data(error)),
                "everywhere": world.gather_over_data(generation.tokens_BT.tolist()),
            }
        )
    dist.barrier()
    return {"runs": results}
