"""Two ranks as TP2, PP2 and DP2, and one alone: each goes on from the checkpoints of every other one."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from gapo_mega.config import Config
from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from gapo_mega.runs.start import train
from tests.helpers.ranks import worlds
from tests.helpers.ranks.check_checkpoint import LOSSES, SAME_NUMBERS, Run, distance, relative

# (ranks, tensor, pipeline); data parallelism takes the rest.
LAYOUTS = {"single": (1, 1, 1), "tp2": (2, 2, 1), "pp2": (2, 1, 2), "dp2": (2, 1, 1)}
# A run that goes on in each of them, and comes back to the first.
WAY = ["dp2", "tp2", "pp2", "single", "dp2"]
STEPS = 2
_worlds = count()


def _be(name: str) -> bool:
    """Make this process one of the layout's world; False for a rank that is not in it."""
    worlds.leave()
    if dist.is_initialized():
        dist.destroy_process_group()
    ranks = LAYOUTS[name][0]
    rank, number = int(os.environ["RANK"]), next(_worlds)
    if rank >= ranks:
        return False
    store: dist.Store = dist.HashStore()
    if ranks > 1:
        port = int(os.environ["MASTER_PORT"])
        store = PrefixStore(f"layouts/{number}", dist.TCPStore("localhost", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    return True


def _new_run(args: dict[str, Any], name: str, seed: int) -> Run:
    return Run(args, worlds.enter(*LAYOUTS[name][1:], seed=seed), seed)


def _save(args: dict[str, Any], name: str) -> dict[str, Any]:
    """Train and save; the fingerprint of what was saved, and the losses of the steps that follow."""
    run = _new_run(args, name, seed=1)
    for seed in range(STEPS):
        run.step(seed)
    checkpoint.save(Path(args["directory"]) / name, run.trainables, {"step": STEPS}, run.groups)
    dist.barrier()
    return {"saved": run.fingerprint(), "losses": [run.step(seed) for seed in range(100, 100 + STEPS)]}


def _load(args: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    run = _new_run(args, target, seed=3)
    extra = checkpoint.load(Path(args["directory"]) / source, run.trainables, run.groups)
    loaded = run.fingerprint()
    return {
        "step": extra["step"],
        "loaded": loaded,
        "losses": [run.step(seed) for seed in range(100, 100 + STEPS)],
    }


def _log(args: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a run's log after it has gone on for a step in every layout of ``WAY``."""
    rank = int(os.environ["RANK"])
    for steps, name in enumerate(WAY, 1):
        ranks, tensor, pipeline = LAYOUTS[name]
        config = {**args["config"], "steps": steps, "parallel": {"tensor": tensor, "pipeline": pipeline}}
        if rank < ranks:
            os.environ["WORLD_SIZE"] = str(ranks)
            train(Config.model_validate(config))
            os.environ["WORLD_SIZE"] = "2"
    text = (Path(args["config"]["output_dir"]) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def check(result: dict[str, Any]) -> None:
    """Assert that ``result`` of ``run`` is right."""
    assert len(result["pairs"]) == 12
    for pair, found in result["pairs"].items():
        assert found["step"] == STEPS, pair
        assert found["loaded"] <= SAME_NUMBERS, (pair, found)
        assert found["losses"] <= LOSSES["fp32"], (pair, found)
    assert [line["step"] for line in result["log"]] == list(range(1, len(WAY) + 1))


def run(args: dict[str, Any]) -> dict[str, Any]:
    """Every ordered pair of layouts, and the log of a run. Arguments: directory, config (of a training)."""
    saved: dict[str, dict[str, Any]] = {}
    for name in LAYOUTS:
        saved[name] = _save(args, name) if _be(name) else {}
    pairs = {}
    for target in LAYOUTS:
        if not _be(target):
            continue
        for source in LAYOUTS:
            # Rank 1 has nothing of the one that ran alone.
            if source == target:
                continue
            found, expected = _load(args, source, target), saved[source]
            if int(os.environ["RANK"]) == 0:
                found["loaded"] = distance(found["loaded"], expected["saved"])
                found["losses"] = relative(found["losses"], expected["losses"])
                pairs[f"{source} to {target}"] = found
    _be("dp2")
    log = _log(args)
    _be("dp2")  # for whatever job follows
    return {"pairs": pairs, "log": log}
