"""Advantages of a run with a scalarizer: over data ranks, beside the KL reward, with a critic, in audits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from gapo_mega import advantages, scalarization
from gapo_mega.advantages.group import group_deviations
from gapo_mega.advantages.rewards import kl_returns, with_scores
from gapo_mega.rollout.flat import without_flat
from gapo_mega.rollout.scalarized import Scalarized, Weighing
from gapo_mega.scalarization import Weighted
from gapo_mega.types import Experience
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.fake_runs import PROMPTS, trainer
from tests.helpers.team import Team

NAMES = ["long", "short"]


def experience(seed: int = 0, values: bool = False) -> Experience:
    """Eight responses to four prompts, two objectives, a KL reward."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.zeros(8, 7, dtype=torch.bool)
    for row in range(8):
        mask_BT[row, 2 : 4 + row % 4] = True
    kl_BT = 0.1 * torch.randn(8, 7, generator=generator) * mask_BT
    blank = Experience(
        tokens_BT=torch.zeros(8, 7, dtype=torch.int64),
        response_mask_BT=mask_BT,
        group_B=torch.arange(4).repeat_interleave(2),
        old_logprobs_BT=torch.zeros(8, 7),
        ref_logprobs_BT=torch.zeros(8, 7),
        scores_MB=torch.zeros(2, 8),
        token_rewards_MBT=kl_BT.expand(2, -1, -1),
        values_MBT=torch.randn(2, 8, 7, generator=generator) * mask_BT if values else None,
        kl_rewards_BT=kl_BT,
    )
    return with_scores(blank, torch.randn(2, 8, generator=generator))


def scalarized(name: str, estimator: str = "group", audited: bool = False, **options: Any) -> Scalarized:
    built = scalarization.build(name, **options)
    built.prepare(NAMES)
    return Scalarized(FakeEngine(), built, advantages.build(estimator), audited)


def test_rewards_go_through_the_estimator_as_one_objective() -> None:
    whole = experience()
    found, facts = scalarized("morlhf", preference=[0.25, 0.75])(whole)
    mixed_1B = (torch.tensor([[0.25, 0.75]]) @ whole.scores_MB).float()
    expected = advantages.build("group")(with_scores(whole, mixed_1B))
    assert found.advantages_MBT is not None and expected.advantages_MBT is not None
    # float32 of the mixed scores.
    torch.testing.assert_close(found.advantages_MBT, expected.advantages_MBT, rtol=0, atol=1e-6)
    assert facts == {"reward_weight/long": 0.25, "reward_weight/short": 0.75}
    assert torch.equal(found.scores_MB, whole.scores_MB), "the log has the objectives' own scores"


def test_advantages_are_taken_as_they_are_beside_the_kl_reward() -> None:
    whole = experience(1)
    found, _ = scalarized("gdpo")(whole)
    lengths_B = whole.response_mask_BT.sum(dim=1)
    numbers_B = scalarization.build("gdpo")(whole.scores_MB, whole.group_B, lengths_B)
    numbers_B = numbers_B + group_deviations(kl_returns(whole)[:1], whole.group_B, "leave_one_out")[0]
    expected_BT = torch.where(whole.response_mask_BT, numbers_B.float()[:, None], 0.0)
    assert found.advantages_MBT is not None
    assert torch.equal(found.advantages_MBT, expected_BT[None])


@pytest.mark.parametrize("name", ["morlhf", "gdpo"])
def test_an_audit_has_the_objectives_own_advantages_first(name: str) -> None:
    whole = experience(2)
    found, _ = scalarized(name, audited=True)(whole)
    alone, _ = scalarized(name)(whole)
    own = advantages.build("group")(whole)
    assert found.advantages_MBT is not None and alone.advantages_MBT is not None
    assert own.advantages_MBT is not None
    assert torch.equal(found.advantages_MBT, torch.cat([own.advantages_MBT, alone.advantages_MBT]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gdpo", {}),
        ("gdpo", {"variant": "nemo"}),
        ("gdpo", {"variant": "verl"}),
        ("rvpo", {"whiten": "samples"}),
        ("rvpo", {"whiten": "tokens"}),
        ("gd2po", {}),
        ("mo_grpo", {}),
    ],
)
def test_prompts_that_are_left_out_count_in_no_normalization(name: str, options: dict[str, Any]) -> None:
    scores_MB = experience(1).scores_MB.clone()
    scores_MB[:, :2] = 0.5
    whole = with_scores(experience(1), scores_MB)
    found, _ = scalarized(name, **options)(without_flat(whole))
    alone, _ = scalarized(name, **options)(whole.select(torch.arange(2, 8)))
    assert found.advantages_MBT is not None and alone.advantages_MBT is not None
    assert not found.advantages_MBT[:, :2].any()
    # Float64 sums with and without zeros, rounded to float32.
    torch.testing.assert_close(found.advantages_MBT[:, 2:], alone.advantages_MBT, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["gdpo", "morlhf"])
def test_an_audit_has_the_objectives_advantages_of_a_run_without_a_scalarizer(
    tmp_path: Path, name: str
) -> None:
    """Whitened where the estimator whitens, though the signal beside them may not be."""
    prompts = PROMPTS[:4]

    def advantages_of(folder: str, **settings: Any) -> torch.Tensor:
        run = trainer(tmp_path / folder, advantages={"name": "reinforce_pp"}, **settings)
        found = run.maker.make(prompts, seed=5)[0].advantages_MBT
        assert found is not None
        return found

    plain: dict[str, Any] = {"scalarization": {"name": name}}
    audited = advantages_of("audited", **plain, gradients={"audit_every": 1})
    assert torch.equal(audited, torch.cat([advantages_of("own"), advantages_of("plain", **plain)]))


def test_with_a_critic_the_objectives_advantages_are_summed() -> None:
    """(A_R - lambda A_C) / (1 + lambda), each with its own critic, as Safe RLHF has it."""
    whole = experience(3, values=True)
    found, facts = scalarized("safe_rlhf", "gae", lambda_init=2.0, lambda_lr=0.0)(whole)
    own = advantages.build("gae")(whole)
    assert own.advantages_MBT is not None and found.advantages_MBT is not None
    expected_BT = (own.advantages_MBT[0] + 2.0 * own.advantages_MBT[1]) / 3.0
    torch.testing.assert_close(found.advantages_MBT[0], expected_BT, rtol=1e-6, atol=1e-6)
    assert found.returns_MBT is not None and own.returns_MBT is not None
    assert torch.equal(found.returns_MBT, own.returns_MBT)
    assert facts["lambda/short"] == pytest.approx(2.0)


def test_scores_are_those_of_all_data_ranks(tmp_path: Path) -> None:
    """Two ranks take their parts of what one number a response of the whole batch is."""
    team = Team(world=2, data=2)

    def parts_of(engine: Any) -> tuple[Experience, dict[str, Any]]:
        run = trainer(tmp_path / str(engine.layout.rank), engine, scalarization={"name": "tchebycheff"})
        made, _ = run.maker.make([PROMPTS[i] for i in run.order.items(0)], seed=5)
        assert run.scalarizer is not None
        return made, run.scalarizer.state_dict()

    (first, state), (second, other) = team.run(parts_of)
    assert state == other
    together = dataclasses.replace(
        first,
        scores_MB=torch.cat([first.scores_MB, second.scores_MB], dim=1),
    )
    whole = scalarization.build("tchebycheff")
    whole.prepare(NAMES)
    lengths_B = torch.cat([part.response_mask_BT.sum(dim=1) for part in (first, second)])
    group_B = torch.cat([first.group_B, 100 + second.group_B])
    whole.commit(together.scores_MB, group_B, lengths_B)
    assert whole.state_dict() == state


def test_the_memory_of_a_scalarizer_is_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scalarization": {"name": "safe_rlhf"}, "gradients": {"audit_every": 2}}
    straight = trainer(tmp_path / "straight", **settings)
    assert straight.run()
    assert not trainer(tmp_path / "run", FakeEngine(at={("update_policy", 2): terminate}), **settings).run()
    again = trainer(tmp_path / "run", **settings)
    assert again.run()
    assert again.scalarizer is not None and straight.scalarizer is not None
    assert again.scalarizer.state_dict() == straight.scalarizer.state_dict()
    assert again.scalarizer.state_dict()["steps"] == 4


UPDATES = {"algorithm": {"ppo_epochs": 2, "minibatches": 2}}


def lines_of(run: Any) -> list[dict[str, Any]]:
    assert run.run()
    log = Path(run.config.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("name", ["morlhf", "safe_rlhf", "fast_rl", "ctwa", "tchebycheff"])
def test_a_safe_scalarizer_gives_weights_to_start_from(tmp_path: Path, name: str) -> None:
    """Every update's weights by SciPy, from the logged norms, cosines and weights of the rollout."""
    safe = {"name": name, "options": {"safe": True}}
    lines = lines_of(trainer(tmp_path / "safe", scalarization=safe, **UPDATES))
    assert len(lines) == 16
    raised = 0
    for line in lines:
        norms = np.array([line[f"grad_norm/{n}"] for n in NAMES])
        cosine = line["cosine/long/short"]
        rows = norms[:, None] * np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])
        given = np.array([line[f"reward_weight/{n}"] for n in NAMES])
        found, _ = nnls(rows.T, -rows.T @ given)
        logged = np.array([line[f"weight/{n}"] for n in NAMES])
        # The sine of nearly opposed gradients has lost half of the cosine's digits.
        np.testing.assert_allclose(logged, given + found, rtol=1e-6)
        raised += bool(found.any())
        assert line["conflict"] == 0.0
    assert raised > 0, "else the test shows nothing"
    # The fake policy does not look at weights: scores, and so the scalarizer's memory, are the same.
    plain = lines_of(trainer(tmp_path / "plain", scalarization={"name": name}, **UPDATES))
    kinds = ("reward_weight/", "lambda/", "covariance/", "progress/")
    for line, other in zip(lines, plain, strict=True):
        facts = {key: value for key, value in other.items() if key.startswith(kinds)}
        assert facts and facts == {key: value for key, value in line.items() if key.startswith(kinds)}


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [("morlhf", "weighted_sum", {"safe": True}), ("tchebycheff", "tchebycheff_safe", {})],
)
def test_the_aggregators_that_start_from_the_same_weights_agree(
    tmp_path: Path, name: str, method: str, options: dict[str, Any]
) -> None:
    safe = lines_of(trainer(tmp_path / "safe", scalarization={"name": name, "options": {"safe": True}}))
    others = lines_of(trainer(tmp_path / "own", aggregation={"name": method, "options": options}))
    for line, other in zip(safe, others, strict=True):
        for key in ("weight", "predicted_change", "grad_norm"):
            # Means of float32 scores, one taken in float32 and the other in float64.
            assert [line[f"{key}/{n}"] for n in NAMES] == pytest.approx(
                [other[f"{key}/{n}"] for n in NAMES], rel=1e-5
            )


def test_a_safe_run_is_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scalarization": {"name": "ctwa", "options": {"safe": True}}, **UPDATES}
    straight = lines_of(trainer(tmp_path / "straight", **settings))
    stopping = FakeEngine(at={("update_policy", 6): terminate})
    assert not trainer(tmp_path / "run", stopping, **settings).run()
    again = lines_of(trainer(tmp_path / "run", **settings))
    keys = [key for key in straight[0] if key.startswith(("weight/", "reward_weight/", "grad_norm/"))]
    assert [[line[key] for key in keys] for line in again] == [
        [line[key] for key in keys] for line in straight
    ]


def test_a_safe_scalarizer_sees_all_data_ranks(tmp_path: Path) -> None:
    team = Team(world=2, data=2)

    def weights_of(engine: Any) -> list[float]:
        safe = {"name": "fast_rl", "options": {"safe": True}}
        run = trainer(tmp_path / str(engine.layout.rank), engine, scalarization=safe)
        _, facts = run.maker.make([PROMPTS[i] for i in run.order.items(0)], seed=5)
        gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
        weights = run.aggregator(gram).tolist()
        assert weights == [facts.extra[f"reward_weight/{n}"] for n in NAMES]
        return [*weights, *facts.rewards]

    first, second = team.run(weights_of)
    assert first == second
    powers = np.exp(-0.1 * np.array(first[2:]))
    # The log's means are of float32.
    np.testing.assert_allclose(first[:2], powers / powers.sum(), rtol=1e-5)


def test_a_safe_scalarizer_leaves_advantages_to_the_estimator(tmp_path: Path) -> None:
    """One set an objective, whatever the estimator: with a critic, whitened, with a KL row apart."""
    for number, estimator in enumerate(["gae", "reinforce_pp", "grpo"]):
        found = []
        for name, sections in (("own", {}), ("safe", {"scalarization": SAFE})):
            folder = tmp_path / f"{number}{name}"
            run = trainer(folder, advantages={"name": estimator}, algorithm={"kl": "apart"}, **sections)
            found.append(run.maker.make(PROMPTS[:4], seed=5)[0].advantages_MBT)
        own, safe = found
        assert own is not None and safe is not None and torch.equal(own, safe)
        assert run.rows == ["long", "short", "kl"]


SAFE: dict[str, Any] = {"name": "safe_rlhf", "options": {"safe": True}}


def test_weights_that_are_not_finite_stop_the_run() -> None:
    class Broken(Weighted):
        name = "broken"

        def coefficients(self, *batch: torch.Tensor) -> torch.Tensor:
            return torch.tensor([float("nan"), 1.0])

    taken: list[torch.Tensor] = []
    with pytest.raises(ValueError, match=r"^scalarization\.name: found broken, whose coefficients are \[nan"):
        Weighing(FakeEngine(), Broken(), taken.append)(experience())
    assert not taken
