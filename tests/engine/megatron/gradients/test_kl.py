"""The KL as a term of every loss, as an objective and as a row apart, against float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from gapo_mega import aggregation
from gapo_mega.engine.megatron.gradients.one_pass import OnePass
from gapo_mega.losses import Ppo
from gapo_mega.rollout.kl import KlCoefficient
from gapo_mega.runs.kl import loss_with_kl, method_with_kl
from gapo_mega.types import Experience
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.logits import chosen_logprobs
from tests.helpers.policy_gradients import PARTS, RATE, SGD, WHOLE, Reference, engine_of, flat
from tests.helpers.ranks import check_engine

BETA = 0.4
STRATEGIES = [
    pytest.param({"forward": "separate"}, PARTS, id="separate"),
    pytest.param({"forward": "shared"}, PARTS, id="in turns"),
    pytest.param({"forward": "one_pass"}, PARTS, id="one pass"),
    pytest.param({"store": "single", "forward": "separate"}, PARTS, id="single"),
    pytest.param({"scope": "last_layer", "forward": "shared"}, WHOLE, id="last layer"),
    pytest.param({"scope": "last_block", "forward": "separate"}, PARTS, id="last block"),
]


class WithKl(Reference):
    """The gradients of the objectives and, after them, of the KL, with k3 written down anew."""

    @staticmethod
    def losses_from(logits: Tensor, batch: Experience) -> list[Tensor]:
        chosen = chosen_logprobs(logits, batch.tokens_BT)
        mask = batch.response_mask_BT[:, 1:]
        ratio = (batch.ref_logprobs_BT[:, 1:].double() - chosen)[mask]
        return [*Reference.losses_from(logits, batch), (ratio.exp() - 1 - ratio).mean()]


def batch_with_reference(engine: Any) -> Experience:
    """Reference log-probabilities that differ from the policy's by about 0.5."""
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    generator = torch.Generator().manual_seed(9)
    noise_BT = 0.5 * torch.randn(batch.old_logprobs_BT.shape, generator=generator)
    drifted_BT = (batch.old_logprobs_BT + noise_BT) * batch.response_mask_BT
    return dataclasses.replace(batch, ref_logprobs_BT=drifted_BT)


@pytest.mark.parametrize("kl", ["loss", "objective", "apart"])
@pytest.mark.parametrize(("gradients", "micro_batch"), STRATEGIES)
def test_against_autograd(
    model: Path, tmp_path: Path, gradients: dict[str, Any], micro_batch: int, kl: str
) -> None:
    """Losses, Gram matrix, weights and the step itself. Tolerances as in test_strategies.py."""
    method = aggregation.build("gapo", p=1, scale="mean_norm")
    coefficient = KlCoefficient(BETA)
    algorithm = {"kl": kl, "kl_beta": BETA}
    with engine_of(model, gradients, micro_batch, SGD, algorithm=algorithm) as engine:
        config = engine._config
        batch = batch_with_reference(engine)
        report = engine.update_policy(
            batch, loss_with_kl(Ppo(), config, coefficient), method_with_kl(method, config, coefficient)
        )
        engine.export_hf(tmp_path / "after")
    reference = WithKl(model, batch)
    scope = gradients.get("scope", "full")
    rows, whole = reference.rows(scope), reference.rows()
    losses = reference.losses
    if kl == "loss":
        rows, whole = rows[:-1] + BETA * rows[-1], whole[:-1] + BETA * whole[-1]
        losses = losses[:-1] + BETA * losses[-1]
    torch.testing.assert_close(torch.tensor(report.losses).double(), losses, rtol=1e-5, atol=1e-6)
    assert gram_error(report.gram, rows @ rows.T) <= 1e-5
    if kl == "apart":
        weights = method(rows[:-1] @ rows[:-1].T)
        weights = torch.cat([weights, BETA * weights.sum().view(1)])
    else:
        weights = method(rows @ rows.T)
    torch.testing.assert_close(report.weights, weights, rtol=1e-4, atol=0)
    start = torch.cat(
        [p.detach().flatten() for p in LlamaForCausalLM.from_pretrained(model).double().parameters()]
    )
    expected = RATE * (weights @ whole)
    assert float((flat(tmp_path / "after") - start + expected).norm() / expected.norm()) <= 2e-4


@pytest.mark.parametrize("forward", ["separate", "one_pass"])
def test_the_kl_row_has_no_entropy_bonus(model: Path, forward: str) -> None:
    """The bonus belongs to the objectives: else it would count once more through the KL's weight."""
    coefficient = KlCoefficient(BETA)
    reports = []
    for entropy_beta in (0.0, 0.5):
        algorithm = {"kl": "apart", "kl_beta": BETA, "entropy_beta": entropy_beta}
        with engine_of(model, {"forward": forward}, PARTS, SGD, algorithm=algorithm) as engine:
            config = engine._config
            method = method_with_kl(aggregation.build("gapo"), config, coefficient)
            loss = loss_with_kl(Ppo(), config, coefficient)
            reports.append(engine.update_policy(batch_with_reference(engine), loss, method))
    without, with_bonus = reports
    assert with_bonus.losses[-1] == pytest.approx(without.losses[-1], rel=1e-5)
    assert float(with_bonus.gram[-1, -1]) == pytest.approx(float(without.gram[-1, -1]), rel=1e-4)
    for k in range(check_engine.OBJECTIVES):
        assert abs(with_bonus.losses[k] - without.losses[k]) > 0.1


@pytest.mark.parametrize("kl", ["loss", "objective", "apart"])
def test_one_pass_takes_two_directions(model: Path, kl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward's and the KL's: one backward more for any number of objectives."""
    coefficient = KlCoefficient(BETA)
    algorithm = {"kl": kl, "kl_beta": BETA}
    with engine_of(model, {"forward": "one_pass"}, WHOLE, SGD, algorithm=algorithm) as engine:
        strategy = engine.gradients
        assert isinstance(strategy, OnePass)
        taken: list[Tensor] = []
        take = strategy._accumulator.take

        def counting(coefficients_MB: Tensor, device: torch.device, only: int | None = None) -> None:
            taken.append(coefficients_MB)
            take(coefficients_MB, device, only)

        monkeypatch.setattr(strategy._accumulator, "take", counting)
        config = engine._config
        unclipped = loss_with_kl(Ppo(clip_epsilon=100.0), config, coefficient)
        method = method_with_kl(aggregation.build("gapo"), config, coefficient)
        engine.update_policy(batch_with_reference(engine), unclipped, method)
    assert len(taken) == 2


def test_means_of_gradients_with_a_row_apart(model: Path) -> None:
    """The method sees means of the objectives' gradients, and the log both matrices with the KL."""
    coefficient = KlCoefficient(BETA)
    sections = {"algorithm": {"kl": "apart", "kl_beta": BETA}, "aggregation": {"average": 0.5}}
    method = aggregation.build("gapo", p=1)
    with engine_of(model, {"forward": "one_pass"}, PARTS, SGD, **sections) as engine:
        config = engine._config
        loss, weighing = loss_with_kl(Ppo(), config, coefficient), method_with_kl(method, config, coefficient)
        batch = batch_with_reference(engine)
        for _ in range(3):
            report = engine.update_policy(batch, loss, weighing)
    assert report.averaged_gram is not None and report.averaged_gram.shape == report.gram.shape == (4, 4)
    expected = method(report.averaged_gram[:-1, :-1])
    torch.testing.assert_close(report.weights[:-1], expected, rtol=1e-12, atol=0)
    assert float(report.weights[-1]) == pytest.approx(BETA * float(expected.sum()), rel=1e-12)
