"""What Megatron's optimizer leaves to the next forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gapo_mega import aggregation
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.tiny import tiny_llama

GATHER = {"name": "adam", "lr": 0.01, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[MegatronEngine]:
    tiny_llama(tmp_path / "model")
    sections = {"gradients": {"forward": "separate"}}
    config = check_engine.make_config(str(tmp_path / "model"), {}, GATHER, **sections)
    yield check_engine.build_engine(config)
    worlds.leave()


def gathers(events: profile) -> int:
    """All-gathers of flat buffers."""
    return sum(e.count for e in events.key_averages() if e.key.startswith("c10d::") and "allgather" in e.key)


def test_parameters_are_gathered_once_a_step(engine: MegatronEngine) -> None:
    """Of two updates, with three passes each: every bucket once each, and nothing more for who asks."""
    batch = check_engine.local_part(check_engine.global_batch(200), engine)  # gathers the first ones
    buckets = len(engine.policy.model.bucket_groups)
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    with profile(activities=[ProfilerActivity.CPU]) as first:
        engine.update_policy(batch, check_engine.loss, aggregator)
    assert gathers(first) == 0
    with profile(activities=[ProfilerActivity.CPU]) as second:
        engine.update_policy(batch, check_engine.loss, aggregator)
    assert gathers(second) == buckets
    with profile(activities=[ProfilerActivity.CPU]) as asked, megatron_device():
        engine.policy.gather_parameters()
        engine.policy.gather_parameters()
    assert gathers(asked) == buckets


def test_modules_wait_again_after_a_pass_over_frozen_parameters(engine: MegatronEngine) -> None:
    batch = check_engine.global_batch(200)
    with megatron_device():
        with engine.policy.parameters_gathered():
            for parameter in engine.policy.parameters():
                parameter.requires_grad_(False)
            with torch.no_grad():
                engine.logprobs(batch, "policy")
            for parameter in engine.policy.parameters():
                parameter.requires_grad_(True)
        for group in engine.policy.model.bucket_groups:
            group.param_gather_dispatched = False
        with profile(activities=[ProfilerActivity.CPU]) as found:
            engine.logprobs(batch, "policy")
    assert gathers(found) == len(engine.policy.model.bucket_groups)
