"""Losses, Gram and the first update against transformers and torch.autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gapo_mega import aggregation
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.types import Experience
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.policy_gradients import Reference, flat
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.tiny import tiny_llama

LEARNING_RATE = 0.05


@pytest.fixture(params=["untied", "tied"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MegatronEngine]:
    tiny_llama(tmp_path / "model", tied=request.param == "tied")
    sgd = {"name": "sgd", "distributed": False, "lr": LEARNING_RATE}
    yield check_engine.build_engine(check_engine.make_config(str(tmp_path / "model"), {}, sgd))
    worlds.leave()


def test_against_autograd(engine: MegatronEngine, tmp_path: Path) -> None:
    """fp32 against float64 through 4 layers: 1e-5 relative; a missing parameter would show at 1e-2."""
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    report = engine.update_policy(batch, check_engine.loss, aggregator)
    reference = Reference(tmp_path / "model", batch)
    rows = reference.rows()
    torch.testing.assert_close(torch.tensor(report.losses).double(), reference.losses, rtol=1e-5, atol=1e-6)
    gram = rows @ rows.T
    assert gram_error(report.gram, gram) <= 1e-5
    start = flat(tmp_path / "model")
    expected = start - LEARNING_RATE * (aggregator(gram) @ rows)
    engine.export_hf(tmp_path / "out")
    got = flat(tmp_path / "out")
    assert float((got - expected).norm()) <= 1e-4 * float((expected - start).norm())


def test_second_step_counts_every_microbatch_once(engine: MegatronEngine, tmp_path: Path) -> None:
    """After an optimizer step the same holds again (a stale param.grad would count one twice)."""
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    engine.update_policy(batch, check_engine.loss, aggregator)
    engine.export_hf(tmp_path / "one")
    report = engine.update_policy(batch, check_engine.loss, aggregator)
    rows = Reference(tmp_path / "one", batch).rows()
    assert gram_error(report.gram, rows @ rows.T) <= 1e-5


def test_nonfinite_gradient_is_skipped_and_named(engine: MegatronEngine) -> None:
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    before = [p.detach().clone() for p in engine.policy.model.parameters()]

    def broken(logprobs_BT: torch.Tensor, part: Experience, objective: int) -> torch.Tensor:
        value = check_engine.loss(logprobs_BT, part, objective)
        return value * float("nan") if objective == 1 else value

    aggregator = aggregation.build("gapo")
    report = engine.update_policy(batch, broken, aggregator)
    assert report.skipped and report.nonfinite == [1]
    for old, new in zip(before, engine.policy.model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert not engine.update_policy(batch, check_engine.loss, aggregator).skipped


def test_a_wrong_gram_stops_the_first_step(engine: MegatronEngine) -> None:
    """Parameters that the inner products leave out: the norm identity fails before anything is updated."""
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    before = [p.detach().clone() for p in engine.policy.model.parameters()]
    start, end = engine.gradients.shard.segments[-1]
    engine.gradients.shard.segments[-1] = (start, (start + end) // 2)
    with pytest.raises(RuntimeError, match="lays its gradient buffers out"):
        engine.update_policy(batch, check_engine.loss, aggregation.build("gapo"))
    for old, new in zip(before, engine.policy.model.parameters(), strict=True):
        assert torch.equal(old, new)
