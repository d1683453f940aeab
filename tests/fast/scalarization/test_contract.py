"""What holds for *every* scalarizer: the folder is enumerated, a new file is tested at once."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

from gapo_mega.scalarization import Weighted, build

NAMES = ["first", "second", "third"]
Batch = tuple[Tensor, Tensor, Tensor]


def batch(seed: int, objectives: int = 3, prompts: int = 4, samples: int = 3) -> Batch:
    """Scores whose objectives differ in scale and place, groups and lengths."""
    generator = torch.Generator().manual_seed(seed)
    scores_MB = torch.randn(objectives, prompts * samples, generator=generator)
    scale_M = torch.tensor([1.0, 30.0, 0.2])[:objectives, None]
    lengths_B = torch.randint(1, 40, (prompts * samples,), generator=generator)
    return scores_MB * scale_M + 2 * scale_M, torch.arange(prompts).repeat_interleave(samples), lengths_B


@pytest.mark.every("scalarization")
class TestContract:
    @pytest.mark.parametrize("objectives", [2, 3])
    def test_one_finite_float64_a_response(self, name: str, objectives: int) -> None:
        scalarizer = build(name)
        scalarizer.prepare(NAMES[:objectives])
        whole = batch(0, objectives)
        before = copy.deepcopy(whole)
        found_B = scalarizer(*whole)
        assert found_B.dtype == torch.float64 and found_B.shape == (12,)
        assert bool(found_B.isfinite().all()) and bool(found_B.any())
        assert all(torch.equal(old, new) for old, new in zip(before, whole, strict=True))
        assert scalarizer.gives in ("rewards", "advantages")

    def test_the_order_of_the_responses_does_not_matter(self, name: str) -> None:
        """Of the prompts, and of the samples of one: data ranks come in some order."""
        scalarizer = build(name)
        scalarizer.prepare(NAMES)
        scores_MB, group_B, lengths_B = batch(1)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
        found_B = scalarizer(scores_MB, group_B, lengths_B)[order]
        permuted_B = scalarizer(scores_MB[:, order], group_B[order], lengths_B[order])
        # Float64 sums in another order.
        torch.testing.assert_close(permuted_B, found_B, rtol=0, atol=1e-12 * float(found_B.abs().max()))

    def test_numbers_of_groups_are_names_only(self, name: str) -> None:
        scalarizer = build(name)
        scalarizer.prepare(NAMES)
        scores_MB, group_B, lengths_B = batch(3)
        renamed_B = torch.tensor([7, 2_000_000, 3, 0])[group_B]
        found_B, other_B = (scalarizer(scores_MB, g, lengths_B) for g in (group_B, renamed_B))
        torch.testing.assert_close(other_B, found_B, rtol=0, atol=1e-12 * float(found_B.abs().max()))

    def test_scores_that_are_all_alike_give_no_advantage(self, name: str) -> None:
        scalarizer = build(name)
        scalarizer.prepare(NAMES)
        scores_MB, group_B, lengths_B = batch(4)
        alike_MB = scores_MB[:, :1].expand(-1, 12)
        found_B = scalarizer(alike_MB, group_B, lengths_B)
        expected_B = found_B[:1].expand(12) if scalarizer.gives == "rewards" else torch.zeros(12).double()
        assert torch.equal(found_B, expected_B)

    def test_asking_changes_nothing_and_memory_travels_through_json(self, name: str) -> None:
        """A copy that took over the state after three batches gives the same for a fourth, bit for bit."""
        scalarizer = build(name)
        scalarizer.prepare(NAMES)
        for seed in range(3):
            for _ in range(2):
                scalarizer(*batch(10 + seed))
                scalarizer.facts(*batch(20 + seed))
            scalarizer.commit(*batch(seed))
        straight = build(name)
        straight.prepare(NAMES)
        for seed in range(3):
            straight.commit(*batch(seed))
        resumed = build(name)
        resumed.prepare(NAMES)
        resumed.load_state_dict(json.loads(json.dumps(scalarizer.state_dict())))
        for other in (straight, resumed):
            assert other.state_dict() == scalarizer.state_dict()
            assert torch.equal(other(*batch(5)), scalarizer(*batch(5)))
            assert other.facts(*batch(5)) == scalarizer.facts(*batch(5))

    def test_the_state_of_something_else_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"found state \['other'\], accepted: "):
            build(name).load_state_dict({"other": 1})

    def test_facts_have_finite_numbers_under_the_objectives_names(self, name: str) -> None:
        scalarizer = build(name)
        scalarizer.prepare(NAMES)
        facts = scalarizer.facts(*batch(6))
        assert all(isinstance(value, float) and value == value for value in facts.values())
        if isinstance(scalarizer, Weighted):
            coefficients = scalarizer.coefficients(*batch(6)).tolist()
            assert [facts[f"reward_weight/{n}"] for n in NAMES] == coefficients

    def test_options_that_do_not_exist_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"scalarization\.options .*found 'no_such_option'"):
            build(name, no_such_option=1)


def test_a_name_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"scalarization\.name: found 'gdop' \(did you mean 'gdpo'\?\)"):
        build("gdop")


@pytest.mark.parametrize("option", ["preference", "weights"])
def test_options_with_a_number_per_objective_have_one_for_each(option: str) -> None:
    name = {"preference": "morlhf", "weights": "gdpo"}[option]
    scalarizer = build(name, **{option: [0.5, 0.5]})
    with pytest.raises(ValueError, match=rf"^{option}: found 2 numbers, accepted: one for each of the 3"):
        scalarizer.prepare(NAMES)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("morlhf", {"preference": [0.5, 0.6]}, "a list of numbers >= 0 with sum 1"),
        ("morlhf", {"preference": "half"}, "a list of numbers >= 0 with sum 1"),
        ("tchebycheff", {"preference": [0.0, 1.0]}, "a list of numbers > 0 with sum 1"),
        ("tchebycheff", {"mu": 0}, "a finite number > 0"),
        ("ctwa", {"preference": [True, 0.0]}, "a list of numbers > 0 with sum 1"),
        ("ctwa", {"decay": 1.5}, "a finite number >= 0 and <= 1"),
        ("ctwa", {"target": float("nan")}, "a finite number"),
        ("gdpo", {"weights": [0, 0]}, "a list of finite numbers >= 0, not all 0"),
        ("gdpo", {"variant": "TRL"}, "trl, verl, nemo, sum_then_normalize"),
        ("gdpo", {"leave_one_out": False}, r"true \(variant nemo alone has it\)"),
        ("mo_grpo", {"epsilon": -1}, "a finite number >= 0"),
        ("gapo_advantages", {"p": -1}, "a finite number >= 0"),
        ("rvpo", {"k": 0}, "a finite number > 0"),
        ("rvpo", {"whiten": "all"}, "none, samples, tokens"),
        ("gd2po", {"filter": "soft"}, "hard, snr"),
        ("gd2po", {"tau": 2}, "a finite number >= 0 and <= 1"),
        ("fast_rl", {"rate": True}, "a finite number >= 0"),
        ("safe_rlhf", {"costs": "harmless"}, "a list of different names of objectives"),
        ("safe_rlhf", {"costs": ["a", "a"]}, "a list of different names of objectives"),
        ("safe_rlhf", {"window": 0}, "a whole number >= 1"),
        ("safe_rlhf", {"lambda_init": 20}, "at most lambda_max 10.0"),
    ],
)
def test_wrong_values_are_refused(name: str, options: dict[str, object], said: str) -> None:
    begins = rf"^scalarization\.options \({name}\): \w+: found .*"
    with pytest.raises(ValueError, match=f"{begins}, accepted: {said}$"):
        build(name, **options)
