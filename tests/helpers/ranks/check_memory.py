"""Steps with an aggregator that has memory: what every rank comes to remember."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from gapo_mega.types import Experience
from tests.helpers.aggregators import OnDevice, OnHost
from tests.helpers.ranks import check_engine


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, layout, optimizer. A step, one whose loss is NaN on the last rank, and a step."""

    def broken(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        value = check_engine.loss(logprobs_BT, batch, objective)
        return value * float("nan") if dist.get_rank() == dist.get_world_size() - 1 else value

    config = check_engine.make_config(arguments["model"], arguments["layout"], arguments["optimizer"])
    engine = check_engine.build_engine(config)
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    remembered: dict[str, list[dict[str, Any]]] = {}
    skipped: list[bool] = []
    for kind in (OnHost, OnDevice):
        aggregator = kind()
        for loss in (check_engine.loss, broken, check_engine.loss):
            skipped.append(engine.update_policy(batch, loss, aggregator).skipped)
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, aggregator.state_dict())
        remembered[kind.name] = states
    return {"remembered": remembered, "skipped": skipped}
