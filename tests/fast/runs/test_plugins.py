"""Plug-ins of the user's own, asked before the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapo_mega import advantages
from gapo_mega.runs.plugins import check_estimator
from tests.helpers.fake_runs import configuration

OWN_ESTIMATORS = """
import torch
from dataclasses import replace
from gapo_mega.advantages.base import AdvantageEstimator

class Nothing(AdvantageEstimator):
    def __call__(self, experience):
        pass

class Forgot(AdvantageEstimator):
    def __call__(self, experience):
        return experience

class Sequences(AdvantageEstimator):
    def __call__(self, experience):
        return replace(experience, advantages_MBT=experience.scores_MB)

class Spills(AdvantageEstimator):
    def __call__(self, experience):
        return replace(experience, advantages_MBT=torch.ones_like(experience.token_rewards_MBT))

class Infinite(AdvantageEstimator):
    def __call__(self, experience):
        return replace(experience, advantages_MBT=experience.token_rewards_MBT / 0)

class NoReturns(AdvantageEstimator):
    needs_values = True
    def __call__(self, experience):
        assert experience.values_MBT is not None
        return replace(experience, advantages_MBT=experience.token_rewards_MBT)

class Fits(AdvantageEstimator):
    least_samples = 2
    def __call__(self, experience):
        assert torch.bincount(experience.group_B).tolist() == [2, 2]
        return replace(experience, advantages_MBT=experience.token_rewards_MBT.double())
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Nothing", "which gives NoneType, accepted: an estimator that gives the experience"),
        ("Forgot", "whose advantages_MBT is NoneType, accepted: a tensor of finite numbers"),
        ("Sequences", r"whose advantages_MBT is shape \[1, 4\], accepted: .* here of shape \[1, 4, 4\]$"),
        ("Spills", r"whose advantages_MBT is shape \[1, 4, 4\], accepted: .* numbers, 0 off the response"),
        ("Infinite", r"whose advantages_MBT is shape \[1, 4, 4\], accepted: a tensor of finite numbers"),
        ("NoReturns", "whose returns_MBT is NoneType, accepted: a tensor"),
    ],
)
def test_an_estimator_of_ones_own_is_asked_before_the_run(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "own.py").write_text(OWN_ESTIMATORS)

    def check(name: str) -> None:
        own = f"{tmp_path}/own.py:{name}"
        config = configuration(tmp_path, advantages={"name": own}, objectives=[{"name": "long"}])
        check_estimator(config, advantages.build(own))

    with pytest.raises(ValueError, match=rf"^advantages\.name: found .*{name}, {said}") as caught:
        check(name)
    assert "\n" not in str(caught.value)
    check("Fits")


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(advantages.estimators()))
def test_the_package_s_own_pass(tmp_path: Path, name: str, samples: int) -> None:
    estimator = advantages.build(name)
    rollout = {"prompts_per_step": 4, "samples_per_prompt": max(samples, estimator.least_samples)}
    check_estimator(configuration(tmp_path, rollout=rollout), estimator)


def test_a_plan_of_absurdly_many_samples_asks_with_fewer(tmp_path: Path) -> None:
    """A made-up batch of them all would not fit into memory."""
    config = configuration(tmp_path, rollout={"samples_per_prompt": 2**31 - 1})
    check_estimator(config, advantages.build("group"))
