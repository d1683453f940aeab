"""Gradients of two objectives in one layout, tensor by tensor against transformers' autograd in float64."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega import aggregation
from gapo_mega.config import GradientConfig, ModelConfig, OptimizerConfig, ParallelConfig
from gapo_mega.config.strategies.kept_rows import KeptRows
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.gradients.kept_rows import Shards
from gapo_mega.engine.megatron.gradients.passes import Task
from gapo_mega.engine.megatron.gradients.update import Setting
from gapo_mega.engine.megatron.model import build
from gapo_mega.engine.megatron.model.logprobs import Distribution
from gapo_mega.engine.megatron.model.optimizer import make_trainable
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.clock import Clock
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.types import Experience
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.ranks import worlds
from tests.helpers.sampled import processors, random_kept, sampled_logprobs

ROWS, COLUMNS, MICRO_BATCH = 8, 21, 2  # an odd length: sequence parallelism has to pad
WEIGHTS = [0.25, 0.75]
# Responses are drawn as in the paper, from a part of the vocabulary; a penalty that shows.
TEMPERATURE, PENALTY, SHARE = 0.7, 1.3, 0.3


def global_batch(vocabulary: int) -> Experience:
    """The same on every rank; ``advantages_MBT`` are the coefficients of the log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    mask_BT = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    mask_BT[:, :4] = False
    empty_BT = torch.zeros(ROWS, COLUMNS)
    tokens_BT = torch.randint(0, vocabulary, (ROWS, COLUMNS), generator=generator)
    return Experience(
        tokens_BT=tokens_BT,
        response_mask_BT=mask_BT,
        kept=random_kept(tokens_BT, mask_BT, vocabulary, SHARE)[0],
        group_B=torch.zeros(ROWS, dtype=torch.int64),
        old_logprobs_BT=empty_BT,
        ref_logprobs_BT=empty_BT,
        scores_MB=torch.zeros(len(WEIGHTS), ROWS),
        token_rewards_MBT=empty_BT.expand(len(WEIGHTS), -1, -1),
        advantages_MBT=torch.randn(len(WEIGHTS), ROWS, COLUMNS, generator=generator) * mask_BT,
    )


def loss(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """Linear in the log-probabilities."""
    assert batch.advantages_MBT is not None
    return (batch.advantages_MBT[objective] * logprobs_BT).sum()


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, export (folders), layout, shared (objectives take turns on a microbatch).

    Gives ``gram_error``, over the norms, and ``errors``: of every tensor of the combined gradient the
    greatest difference over its greatest element.
    """
    layout = ParallelConfig.model_validate(arguments["layout"])
    world = worlds.enter_layout(layout)
    directory, export = Path(arguments["model"]), Path(arguments["export"])
    gram = _write_gradient(directory, export, layout, world, arguments["shared"])
    if world.layout.rank != 0:
        return {}
    found = load_file(export / "model.safetensors")
    expected_gram, expected = _transformers_gradients(directory)
    assert found.keys() == expected.keys()
    return {
        "gram_error": gram_error(gram, expected_gram),
        "errors": {n: float((found[n] - g).abs().max() / g.abs().max()) for n, g in expected.items()},
    }


def _write_gradient(
    directory: Path, export: Path, layout: ParallelConfig, world: groups.Groups, shared: bool
) -> Tensor:
    """The combined gradient as a Hugging Face directory, and the Gram matrix of the objectives'."""
    shape = shape_of(HFDirectory(directory).config)
    batch = global_batch(shape.vocab)
    part = batch.select(torch.arange(ROWS).chunk(world.layout.data)[world.layout.data_rank])
    with megatron_device():
        chunks = build.build_chunks(shape, ModelConfig(path=str(directory)), layout)
        for chunk in chunks:
            weights.load_hf(chunk, shape, directory)
        optimizer = OptimizerConfig(name="sgd", distributed=False)
        trainable = make_trainable(chunks, optimizer, total_steps=1)
        drawn = Distribution(shape.vocab, TEMPERATURE, PENALTY)
        setting = Setting(
            trainable,
            world,
            len(WEIGHTS),
            drawn,
            shape.num_layers,
            MICRO_BATCH,
            shared,
            adam=False,
            longest=1,
        )
        tokens = float(batch.response_mask_BT.sum())
        task = Task(part.split(MICRO_BATCH), loss, tokens, drawn, len(WEIGHTS))
        aggregator = aggregation.build("weighted_sum", weights=WEIGHTS)
        direction = Shards(setting, KeptRows(GradientConfig())).direction(task, aggregator, Clock())
        with torch.no_grad():  # without the distributed optimizer every rank has all of its gradient
            for parameter in trainable.parameters():
                parameter.copy_(parameter.main_grad)
        weights.export_hf(chunks, shape, directory, export)
    return direction.gram


def _transformers_gradients(directory: Path) -> tuple[Tensor, dict[str, Tensor]]:
    # The default for experts has no float64.
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").double().eval()
    model.get_input_embeddings().padding_idx = None  # transformers gives that row no gradient
    batch = global_batch(model.config.vocab_size)
    tokens_BT, mask_BT = batch.tokens_BT, batch.response_mask_BT
    _, dropped_BTV = random_kept(tokens_BT, mask_BT, model.config.vocab_size, SHARE)
    chain = processors(TEMPERATURE, PENALTY)
    logprobs_BT = sampled_logprobs(model(tokens_BT).logits, tokens_BT, chain, dropped_BTV)
    parameters = dict(model.named_parameters())
    rows: list[dict[str, Tensor]] = []
    for objective in range(len(WEIGHTS)):
        value = loss(logprobs_BT, batch, objective) / batch.response_mask_BT.sum()
        found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        rows.append(dict(zip(parameters, found, strict=True)))
    flat_MN = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(sum(w * row[name] for w, row in zip(WEIGHTS, rows, strict=True)))
    # Files have tensors of their own for what is one parameter in memory, as the weights of all experts.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        combined = dict(load_file(Path(folder) / "model.safetensors"))
    return flat_MN @ flat_MN.T, combined
