"""Updates with weights from running means of gradients, perhaps with a checkpoint on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapo_mega import aggregation
from gapo_mega.aggregation import Aggregator
from gapo_mega.types import Experience
from tests.helpers.ranks import check_engine

STEPS = 5
SAVED = 3  # updates before the checkpoint
SKIPPED = 2  # updates before the one that is skipped
AVERAGE = 0.7


def reinforce(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """``-A log pi``, summed."""
    assert batch.advantages_MBT is not None
    return -(batch.advantages_MBT[objective] * logprobs_BT * batch.response_mask_BT).sum()


def broken(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """The last objective's loss is NaN."""
    value = reinforce(logprobs_BT, batch, objective)
    return value * float("nan") if objective == check_engine.OBJECTIVES - 1 else value


def batch_of(step: int) -> Experience:
    """The same on every rank, with other advantages at every step."""
    batch = check_engine.global_batch(200)
    generator = torch.Generator().manual_seed(step)
    noise_MB = torch.randn(batch.scores_MB.shape, generator=generator)
    advantages_MB = batch.scores_MB + 2.0 * noise_MB
    return dataclasses.replace(batch, advantages_MBT=advantages_MB[:, :, None] * batch.response_mask_BT)


def method() -> Aggregator:
    return aggregation.build("gapo", p=1, scale="mean_norm")


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, layout, optimizer, sections, and perhaps

    ``export``: a folder for the parameters before every update; ``save``: one for a checkpoint;
    ``load``: one to go on from.
    """
    sections = {"aggregation": {"average": AVERAGE}, **arguments.get("sections", {})}
    config = check_engine.make_config(
        arguments["model"], arguments["layout"], arguments["optimizer"], **sections
    )
    engine = check_engine.build_engine(config)
    reports = []
    first = 0
    if "load" in arguments:
        engine.load(Path(arguments["load"]))
        first = SAVED
    for step in range(first, STEPS):
        rows = torch.arange(check_engine.ROWS).chunk(engine.layout.data)[engine.layout.data_rank]
        batch = batch_of(step).select(rows)
        if step == SKIPPED:
            assert engine.update_policy(batch, broken, method()).skipped
        if "export" in arguments:
            engine.export_hf(Path(arguments["export"]) / str(step))
        reports.append(engine.update_policy(batch, reinforce, method()))
        if "save" in arguments and step == SAVED - 1:
            engine.save(Path(arguments["save"]), {})
    grams = [report.averaged_gram for report in reports]
    return {
        "weights": [report.weights.tolist() for report in reports],
        "gram": [report.gram.tolist() for report in reports],
        "averaged": [None if gram is None else gram.tolist() for gram in grams],
        "skipped": [report.skipped for report in reports],
    }
