"""A policy with experts in one layout: Gram matrix and norm of its updates, and its checkpoint in others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gapo_mega import aggregation
from tests.helpers.ranks import check_engine
from tests.helpers.ranks.check_engine import parameters

ADAM = {"name": "adam", "lr": 0.01, "eps": 1e-4}


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, folder, layout, load (layouts).

    Two steps of Adam with the distributed optimizer in ``layout``, a checkpoint, and two further steps; then
    these two from the checkpoint in every layout of ``load``. Gives by layout ``loaded`` (names of
    parameters that differ behind the loading) and ``grams``, the two steps' Gram matrices: the third follows
    from the weights alone, the fourth from the optimizer's state, too. Of ``layout`` itself it gives
    ``grams`` of all steps, ``norms``, Megatron's of each step beside the Gram matrix's, and ``finite``,
    whether the weights are, before and after the last rank got one that is not.
    """
    folder = Path(arguments["folder"])
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    config = check_engine.make_config(arguments["model"], arguments["layout"], ADAM)
    engine = check_engine.build_engine(config)
    batch = check_engine.global_batch(200)

    def step(engine: Any) -> Any:
        return engine.update_policy(check_engine.local_part(batch, engine), check_engine.loss, aggregator)

    reports = [step(engine) for _ in range(2)]
    engine.save(folder / "checkpoint", {"step": 2})
    engine.export_hf(folder / "saved")
    reports += [step(engine) for _ in range(2)]
    finite = [engine.is_finite()]
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            next(iter(engine.policy.parameters())).view(-1)[-1] = math.nan
    finite.append(engine.is_finite())
    found: dict[str, Any] = {
        "finite": finite,
        "norms": [[r.gradient_norm, float((r.weights @ r.gram @ r.weights).sqrt())] for r in reports],
        "grams": [r.gram.tolist() for r in reports],
        "layouts": {},
    }
    for name, layout in arguments["load"].items():
        other = check_engine.build_engine(check_engine.make_config(arguments["model"], layout, ADAM))
        extra = other.load(folder / "checkpoint")
        other.export_hf(folder / name)
        dist.barrier()
        saved, loaded = parameters(folder / "saved"), parameters(folder / name)
        assert saved.keys() == loaded.keys() and extra == {"step": 2}
        found["layouts"][name] = {
            "loaded": [key for key, value in saved.items() if not torch.equal(value, loaded[key])],
            "grams": [step(other).gram.tolist() for _ in range(2)],
        }
    return found
