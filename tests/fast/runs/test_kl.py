"""What ``algorithm.kl`` makes of rewards, losses, weights and the log, above a fake engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gapo_mega import losses
from gapo_mega.losses import Ppo
from gapo_mega.losses.kl import kl_estimates
from gapo_mega.losses.statistics import policy_statistics
from gapo_mega.rollout.kl import KlCoefficient
from gapo_mega.runs.kl import loss_with_kl
from gapo_mega.types import Experience
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.fake_runs import configuration, trainer

MODES = ("reward", "loss", "objective", "apart")


def engine_for(kl: str, **at: Any) -> FakeEngine:
    engine = FakeEngine(**at)
    engine.kl_rows = int(kl in ("objective", "apart"))
    return engine


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def batch() -> Experience:
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.tensor([[False, True, True, True], [False, True, True, False]])
    advantages_MBT = torch.randn(2, 2, 1, generator=generator) * mask_BT
    return Experience(
        tokens_BT=torch.ones(2, 4, dtype=torch.int64),
        response_mask_BT=mask_BT,
        group_B=torch.zeros(2, dtype=torch.int64),
        old_logprobs_BT=-torch.rand(2, 4, generator=generator) * mask_BT,
        ref_logprobs_BT=-torch.rand(2, 4, generator=generator) * mask_BT,
        scores_MB=advantages_MBT[:, :, 1],
        token_rewards_MBT=advantages_MBT,
        advantages_MBT=advantages_MBT,
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl", MODES)
def test_the_loss_of_every_row(tmp_path: Path, kl: str, estimator: Any) -> None:
    config = configuration(tmp_path, algorithm={"kl": kl, "kl_estimator": estimator, "kl_beta": 0.3})
    coefficient = KlCoefficient(0.3)
    loss = loss_with_kl(Ppo(), config, coefficient)
    part = batch()
    logprobs_BT = part.old_logprobs_BT + 0.01
    alone = [float(Ppo()(logprobs_BT, part, k)) for k in range(2)]
    term = float(kl_estimates(estimator, logprobs_BT, part).sum())
    assert abs(term) > 1e-3
    expected = {
        "reward": alone,
        "loss": [value + 0.3 * term for value in alone],
        "objective": [*alone, term],
        "apart": [*alone, term],
    }[kl]
    assert len(config.rows) == len(expected)
    found = [float(loss(logprobs_BT, part, k)) for k in range(len(expected))]
    assert found == pytest.approx(expected, rel=1e-5)
    # A coefficient that moved is the one that counts.
    coefficient.value = 0.0
    if kl == "loss":
        assert [float(loss(logprobs_BT, part, k)) for k in range(2)] == alone


@pytest.mark.parametrize("kl", ["loss", "objective", "apart"])
@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo"])
def test_the_kl_is_divided_as_the_loss_is(tmp_path: Path, name: str, kl: str) -> None:
    """Responses of two and three tokens: per response for ``grpo``, else one sum."""
    config = configuration(tmp_path, algorithm={"kl": kl, "kl_estimator": "k2"})
    base = losses.build(name)
    loss = loss_with_kl(base, config, KlCoefficient(1.0))
    part = batch()
    logprobs_BT = part.old_logprobs_BT + 0.5  # beyond the upper bound
    ratio_BT = (logprobs_BT - part.ref_logprobs_BT) * part.response_mask_BT
    sums_B = (ratio_BT.square() / 2).sum(dim=1)
    per_response = float((sums_B / torch.tensor([3.0, 2.0])).sum())
    expected = per_response if name == "grpo" else float(sums_B.sum())
    if kl == "loss":
        found = float(loss(logprobs_BT, part, 0)) - float(base(logprobs_BT, part, 0))
    else:
        found = float(loss(logprobs_BT, part, 2))
    assert found == pytest.approx(expected, rel=1e-4)
    assert loss.normalization == base.normalization
    # The log's clip fractions are the loss's own, and 0 for the KL's row.
    statistics = policy_statistics(loss, logprobs_BT, part, len(config.rows))
    own = policy_statistics(base, logprobs_BT, part, 2)
    assert torch.equal(statistics.clipped_MC[:2], own.clipped_MC) and bool(own.clipped_MC.any())
    assert not statistics.clipped_MC[2:].any()


@pytest.mark.parametrize("kl", MODES)
def test_the_kl_is_divided_and_the_bounds_are_told_as_the_loss_says(tmp_path: Path, kl: str) -> None:
    """With means over sequences the KL is the sum of the two responses' means as well."""
    config = configuration(tmp_path, algorithm={"kl": kl, "kl_estimator": "k2", "kl_beta": 0.3})
    own = Ppo(clip_epsilon=0.005, normalization="sequence_mean")
    loss, part = loss_with_kl(own, config, KlCoefficient(0.3)), batch()
    assert loss.normalization == "sequence_mean" and loss.clips == own.clips
    logprobs_BT = part.old_logprobs_BT + 0.01
    mask_BT = part.response_mask_BT
    values_BT = (logprobs_BT - part.ref_logprobs_BT).square() / 2 * mask_BT
    term = float((values_BT.sum(dim=1) / mask_BT.sum(dim=1)).sum())
    share = {"reward": 0.0, "loss": 0.3, "objective": 0.0, "apart": 0.0}[kl]
    for k in range(2):
        expected = float(own(logprobs_BT, part, k)) + share * term
        assert float(loss(logprobs_BT, part, k)) == pytest.approx(expected, rel=1e-5)
        assert torch.equal(loss.clipped(logprobs_BT, part, k), own.clipped(logprobs_BT, part, k))
    assert own.clipped(logprobs_BT, part, 0).any()
    if kl in ("objective", "apart"):
        assert float(loss(logprobs_BT, part, 2)) == pytest.approx(term, rel=1e-5)
        assert not policy_statistics(loss, logprobs_BT, part, 3).clipped_MC[2].any()


@pytest.mark.parametrize("kl", MODES)
def test_a_run_logs_every_row(tmp_path: Path, kl: str) -> None:
    engine = engine_for(kl)
    engine.policy = 4  # not the reference
    algorithm = {"kl": kl, "kl_beta": 0.5}
    run = trainer(tmp_path, engine, steps=2, algorithm=algorithm, aggregation={"options": {"p": 1}})
    assert run.run()
    rows = ["long", "short", *(["kl"] if engine.kl_rows else [])]
    for line in lines(tmp_path):
        for prefix in ("grad_norm", "weight", "predicted_change", "loss", "excluded", "nonfinite"):
            assert [key for key in line if key.startswith(f"{prefix}/")] == [f"{prefix}/{r}" for r in rows]
        assert [key for key in line if key.startswith("reward/")] == ["reward/long", "reward/short"]
        if kl == "apart":
            total = line["weight/long"] + line["weight/short"]
            assert line["weight/kl"] == pytest.approx(0.5 * total, rel=1e-12)
        assert "kl_beta" not in line


@pytest.mark.parametrize("kl", MODES)
def test_only_the_reward_mode_rewards_closeness(tmp_path: Path, kl: str) -> None:
    engine = engine_for(kl)
    engine.policy = 4
    run = trainer(tmp_path, engine, steps=1, algorithm={"kl": kl, "kl_beta": 0.5})
    experience, _ = run.maker.make(list(run.prompts[:4]), 3)
    assert experience.kl_rewards_BT is not None
    assert bool(experience.kl_rewards_BT.any()) is (kl == "reward")
    off_the_end = experience.token_rewards_MBT[0][experience.response_mask_BT].count_nonzero()
    responses = experience.response_mask_BT.any(dim=1).sum()
    assert (off_the_end > responses) == (kl == "reward")


@pytest.mark.parametrize("kl", ["reward", "loss", "apart"])
def test_a_target_steers_the_coefficient_and_a_checkpoint_has_it(tmp_path: Path, kl: str) -> None:
    algorithm = {"kl": kl, "kl_beta": 0.5, "kl_target": 1e-3, "kl_horizon": 100}

    def run(directory: Path, **at: Any) -> bool:
        engine = engine_for(kl, **at)
        engine.policy = 4
        return trainer(directory, engine, algorithm=algorithm).run()

    assert run(tmp_path / "whole")
    whole = [line["kl_beta"] for line in lines(tmp_path / "whole")]
    assert whole[0] == 0.5 and len(set(whole)) == 4
    for before, line, after in zip(whole, lines(tmp_path / "whole"), whole[1:], strict=False):
        error = line["kl"] * line["response_length"] / 1e-3 - 1
        assert after == pytest.approx(before * (1 + min(0.2, max(-0.2, error)) * 8 / 100), rel=1e-9)
    assert not run(tmp_path / "cut", at={("update_policy", 2): terminate})
    assert run(tmp_path / "cut")
    assert [line["kl_beta"] for line in lines(tmp_path / "cut")] == whole


def test_the_coefficient_weighs_the_row_apart(tmp_path: Path) -> None:
    algorithm = {"kl": "apart", "kl_beta": 0.5, "kl_target": 1e-3, "kl_horizon": 100}
    engine = engine_for("apart")
    engine.policy = 4
    assert trainer(tmp_path, engine, algorithm=algorithm).run()
    for line in lines(tmp_path):
        total = line["weight/long"] + line["weight/short"]
        assert line["weight/kl"] == pytest.approx(line["kl_beta"] * total, rel=1e-12)


def test_a_zero_kl_gradient_is_named(tmp_path: Path) -> None:
    engine = engine_for("objective")
    engine.policy = 0  # the reference itself
    engine.next_report = {"excluded": [2]}
    run = trainer(tmp_path, engine, steps=1, algorithm={"kl": "objective"})
    assert run.run()
    (line,) = lines(tmp_path)
    assert line["excluded/kl"] == 1.0 and line["excluded/long"] == 0.0


@pytest.mark.parametrize("kl", ["loss", "objective", "apart"])
def test_the_kl_of_a_loss_takes_the_weights_of_the_advantages(tmp_path: Path, kl: str) -> None:
    """By hand: the sum over tokens of weight times estimate; a token of weight 0 has no gradient at all."""
    config = configuration(tmp_path, algorithm={"kl": kl, "kl_beta": 0.3})
    loss, part = loss_with_kl(Ppo(), config, KlCoefficient(0.3)), batch()
    weights_BT = torch.tensor([[0.0, 0.5, 2.0, 0.0], [0.0, 1.25, 0.0, 0.0]])
    ref_BT = part.ref_logprobs_BT.clone()
    ref_BT[0, 3] = -torch.inf  # the reference rules out a token that is left out
    corrected = replace(part, correction_BT=weights_BT, ref_logprobs_BT=ref_BT)
    logprobs_BT = (part.old_logprobs_BT + 0.01).requires_grad_()
    row = 0 if kl == "loss" else 2
    value = loss(logprobs_BT, corrected, row)
    r_BT = logprobs_BT.detach().double() - part.ref_logprobs_BT.double()
    term = float((weights_BT * (torch.exp(-r_BT) - 1 + r_BT)).sum())
    wanted = term if kl != "loss" else float(Ppo()(logprobs_BT.detach(), corrected, 0)) + 0.3 * term
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    (gradient_BT,) = torch.autograd.grad(value, logprobs_BT)
    assert bool(gradient_BT.isfinite().all())
    if kl != "loss":
        assert float(gradient_BT[0, 3]) == float(gradient_BT[1, 2]) == 0.0
