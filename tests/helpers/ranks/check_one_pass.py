"""Rows of one pass against those of a pass for every objective, in one layout."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from gapo_mega.engine.base import PolicyLossSum
from gapo_mega.engine.megatron.gradients import accumulator
from gapo_mega.engine.megatron.gradients.one_pass import OnePass
from gapo_mega.engine.megatron.runtime.clock import Clock
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from tests.helpers.one_pass import by_token, clipped, rows_one_by_one, rows_together, unclipped
from tests.helpers.ranks import check_engine

LOSSES: dict[str, PolicyLossSum] = {"unclipped": unclipped, "clipped": clipped, "by_token": by_token}


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, layout, sections and losses (names of ``LOSSES``).

    Gives by loss ``errors``, of every row over all ranks and relative to its norm, and ``phases``. Weight
    gradients come from tiles, which sequences as short as these would not.
    """
    sgd = {"name": "sgd", "distributed": False}
    sections = {**arguments["sections"], "gradients": {"forward": "one_pass"}}
    engine = check_engine.build_engine(
        check_engine.make_config(arguments["model"], arguments["layout"], sgd, **sections)
    )
    strategy = engine.gradients
    assert isinstance(strategy, OnePass)
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    found = {}
    for name in arguments["losses"]:
        task, clock = strategy._task(batch, LOSSES[name]), Clock()
        with megatron_device(), mock.patch.object(accumulator, "_SHORT", {"cpu": 0}):
            alone = rows_one_by_one(engine, task)
            together, _ = rows_together(strategy, task, clock)
        squares = torch.stack([(together - alone).square().sum(dim=1), alone.square().sum(dim=1)])
        dist.all_reduce(squares)
        errors = (squares[0] / squares[1]).sqrt().tolist()
        found[name] = {"errors": errors, "phases": list(clock.seconds)}
    return found
