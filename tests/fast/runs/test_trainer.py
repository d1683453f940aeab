"""The trainer above a fake engine: order of calls, resuming, and what it does where things fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gapo_mega import advantages, aggregation, losses
from gapo_mega.objectives.base import RewardFailed
from gapo_mega.rollout.backends.megatron import Megatron
from gapo_mega.rollout.backends.vllm import Vllm
from tests.helpers.fake_engine import FakeEngine, layout, terminate
from tests.helpers.fake_runs import HELD_OUT, PROMPTS, Words, trainer
from tests.helpers.metrics_log import CLOCKED, metrics
from tests.helpers.table_policy import TablePolicy
from tests.helpers.team import Team
from tests.helpers.vllm_protocol import table_server


def test_order_of_calls_in_a_step(tmp_path: Path) -> None:
    engine = FakeEngine()
    run = trainer(tmp_path, engine, steps=1, algorithm={"minibatches": 2, "ppo_epochs": 2})
    assert run.run()
    before, step = ["generate"], ["update_weights", "generate", "logprobs policy", "logprobs reference"]
    assert engine.calls == [*before, *step, *["update_policy"] * 4]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    assert run.updates_per_step == 4


def test_order_of_calls_with_a_critic(tmp_path: Path) -> None:
    engine = FakeEngine()
    run = trainer(
        tmp_path, engine, steps=1, advantages={"name": "gae"}, algorithm={"old_logprobs": "generator"}
    )
    assert run.run()
    assert engine.calls == [
        *("generate", "update_weights", "generate", "logprobs reference", "values"),
        *("update_critic", "update_policy"),
    ]
    (line,) = metrics(tmp_path)
    assert {"critic_loss/0", "critic_loss/1"} <= line.keys()


def test_every_prompt_once_an_epoch_and_two_samples_of_each(tmp_path: Path) -> None:
    engine = FakeEngine()
    assert trainer(tmp_path, engine, steps=2).run()
    training = engine.prompts[len(HELD_OUT) :]
    assert training[::2] == training[1::2]
    assert len(set(training)) == 8 and set(training) <= {prompt.token_ids for prompt in PROMPTS}


def test_names_stand_for_the_numbers_of_objectives(tmp_path: Path) -> None:
    assert trainer(tmp_path, steps=1).run()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["time/forward_backward/long"] == 0.5 and "time/forward_backward/0" not in line
    assert line["time/step"] >= line["time/rollout"] > 0
    assert line["memory/peak_bytes"] == 4096


@pytest.fixture
def whole(tmp_path: Path) -> tuple[list[dict[str, Any]], FakeEngine]:
    engine = FakeEngine()
    assert trainer(tmp_path / "whole", engine, algorithm={"minibatches": 2}).run()
    return metrics(tmp_path / "whole", CLOCKED), engine


STEP_CALLS = ("update_weights", "generate", "logprobs policy", "logprobs reference", "update_policy")


@pytest.mark.parametrize("call", STEP_CALLS)
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_signal_at_every_point_of_every_step(
    tmp_path: Path, whole: tuple[list[dict[str, Any]], FakeEngine], call: str, step: int
) -> None:
    """Stopped and resumed, the run sees the same prompts, logs the same numbers, ends at the same policy."""
    expected, undisturbed = whole
    # generate is also called before training, update_policy twice a step
    number = {"generate": step + 1, "update_policy": 2 * step - 1}.get(call, step)
    first = FakeEngine(at={(call, number): terminate})
    finished = trainer(tmp_path / "run", first, algorithm={"minibatches": 2}).run()
    assert finished is (step == 4)
    prompts = first.prompts
    last = first
    if not finished:
        last = FakeEngine()
        assert trainer(tmp_path / "run", last, algorithm={"minibatches": 2}).run()
        assert last.calls[0] == "load" and last.calls.count("generate") == 4 - step
        prompts = first.prompts + last.prompts
    assert metrics(tmp_path / "run", CLOCKED) == expected
    assert prompts == undisturbed.prompts
    assert last.policy == undisturbed.policy


def test_answers_before_training_are_kept_over_a_resume(tmp_path: Path) -> None:
    first = trainer(tmp_path, FakeEngine(at={("update_policy", 2): terminate}))
    assert not first.run()
    again = trainer(tmp_path)
    assert again.run()
    assert again.before == first.before and again.before is not None
    assert again.before.prompts == [prompt.text for prompt in HELD_OUT]


@pytest.mark.parametrize("when", ["held-out", "step 2"])
def test_a_failing_objective(tmp_path: Path, when: str) -> None:
    """Its own error comes out, nothing but the step before is kept, and what was logged stays."""
    failing = Words("broken")
    error = KeyError("the service has gone")

    def fail() -> None:
        failing.fail = error

    engine = FakeEngine(at={("generate", 1 if when == "held-out" else 3): fail})
    with pytest.raises(RewardFailed, match=r"^objective 'broken': .*: KeyError: 'the service has") as caught:
        trainer(tmp_path, engine, [Words("long"), failing]).run()
    assert caught.value.__cause__ is error
    assert engine.calls[-1] == ("save" if when == "step 2" else "generate")
    assert (tmp_path / "metrics.jsonl").exists() is (when == "step 2")
    if when == "step 2":
        assert len(metrics(tmp_path)) == 1


def test_gradients_that_are_not_finite_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.next_report = {"skipped": True, "nonfinite": [1]}
    with pytest.raises(RuntimeError, match="the gradient of short was not finite in 2 updates in a row"):
        trainer(tmp_path, engine, gradients={"max_nonfinite_steps": 2}).run()
    assert engine.calls.count("update_policy") == 2
    assert [line["skipped"] for line in metrics(tmp_path)] == [1.0, 1.0]
    assert "update 2 skipped: the gradient of short is not finite" in caplog.text


def test_a_method_without_weights_is_told_in_its_own_words(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.next_report = {"skipped": True, "reason": "gram: no minimum was found"}
    with pytest.raises(RuntimeError, match=r"^stopped: gram: no minimum was found in 2 updates in a row"):
        trainer(tmp_path, engine, gradients={"max_nonfinite_steps": 2}).run()


def test_skips_are_counted_over_a_resume(tmp_path: Path) -> None:
    engine = FakeEngine(at={("update_policy", 1): terminate})
    engine.next_report = {"skipped": True, "nonfinite": [0]}
    assert not trainer(tmp_path, engine, gradients={"max_nonfinite_steps": 2}).run()
    engine = FakeEngine()
    engine.next_report = {"skipped": True, "nonfinite": [0]}
    with pytest.raises(RuntimeError, match="not finite in 2 updates"):
        trainer(tmp_path, engine, gradients={"max_nonfinite_steps": 2}).run()
    assert engine.calls.count("update_policy") == 1


def test_a_usable_gradient_ends_a_row_of_skips(tmp_path: Path) -> None:
    engine = FakeEngine()

    def skip() -> None:
        engine.next_report.update(skipped=True, nonfinite=[0])

    engine.at = {("update_policy", n): (skip if n % 2 else engine.next_report.clear) for n in range(1, 5)}
    assert trainer(tmp_path, engine, gradients={"max_nonfinite_steps": 2}).run()
    assert [line["skipped"] for line in metrics(tmp_path)] == [1.0, 0.0, 1.0, 0.0]


def test_a_zero_gradient_is_named_where_it_stops_the_run(tmp_path: Path) -> None:
    error = aggregation.ZeroGradientError([1])

    def fail() -> None:
        raise error

    engine = FakeEngine(at={("update_policy", 1): fail})
    with pytest.raises(
        RuntimeError, match=r"stopped: the gradient of short is zero .*zero_gradient is 'stop'"
    ):
        trainer(tmp_path, engine).run()


def test_a_zero_gradient_of_the_kl_is_not_put_down_to_rewards(tmp_path: Path) -> None:
    error = aggregation.ZeroGradientError([2])

    def fail() -> None:
        raise error

    engine = FakeEngine(at={("update_policy", 1): fail})
    with pytest.raises(RuntimeError, match=r"the gradient of kl is zero \(the policy is the reference\)"):
        trainer(tmp_path, engine, algorithm={"kl": "objective"}).run()


def test_other_prompts_than_the_checkpoint_had_are_refused(tmp_path: Path) -> None:
    assert not trainer(tmp_path, FakeEngine(at={("update_policy", 1): terminate})).run()
    with pytest.raises(ValueError, match=r"^data or seed: the checkpoint was written with other prompts"):
        trainer(tmp_path, seed=2).run()


def test_whitened_advantages_over_two_data_ranks(tmp_path: Path) -> None:
    """Mean 0 and variance 1 per objective over both ranks' response tokens."""
    team = Team(world=2, data=2)

    def advantages_of(engine: Any) -> tuple[torch.Tensor, torch.Tensor]:
        run = trainer(tmp_path / str(engine.layout.rank), engine, advantages={"whiten": True})
        experience, _ = run.maker.make([PROMPTS[i] for i in run.order.items(0)], seed=5)
        assert experience.advantages_MBT is not None
        return experience.advantages_MBT, experience.response_mask_BT

    parts = team.run(advantages_of)
    for objective in (0, 1):
        values = torch.cat([a[objective][mask] for a, mask in parts]).double()
        assert values.mean() == pytest.approx(0, abs=1e-6)  # fp32 of values near 1
        assert values.square().mean() == pytest.approx(1, rel=1e-6)


def test_facts_are_those_of_all_data_ranks(tmp_path: Path) -> None:
    """Two ranks log what one rank with both their prompts would."""
    team = Team(world=2, data=2)

    def facts_of(engine: Any) -> Any:
        run = trainer(tmp_path / str(engine.layout.rank), engine)
        experience, facts = run.maker.make([PROMPTS[i] for i in run.order.items(0)], seed=5)
        return experience, facts

    (first, facts), (second, other) = team.run(facts_of)
    assert facts == other
    scores = torch.cat([first.scores_MB, second.scores_MB], dim=1).double()
    assert facts.rewards == pytest.approx(scores.mean(dim=1).tolist())
    groups = [first.group_B, 100 + second.group_B]
    centred = torch.cat([s - s.mean() for g, e in zip(groups, (first, second), strict=True)
                         for s in [e.scores_MB[0, g == k].double() for k in g.unique()]])  # fmt: skip
    other_centred = torch.cat([s - s.mean() for g, e in zip(groups, (first, second), strict=True)
                               for s in [e.scores_MB[1, g == k].double() for k in g.unique()]])  # fmt: skip
    expected = float(torch.corrcoef(torch.stack([centred, other_centred]))[0, 1])
    assert facts.extra["reward_correlation/long/short"] == pytest.approx(expected)


def test_layout_helper() -> None:
    place = layout(rank=3, world=4, data=2)
    assert (place.data_rank, place.tensor_rank, place.is_main) == (1, 1, False)


@pytest.mark.parametrize("name", sorted(advantages.estimators()))
def test_a_run_of_two_steps_with_every_estimator(tmp_path: Path, name: str) -> None:
    engine = FakeEngine()
    filtered = advantages.estimators()[name].least_samples > 1
    run = trainer(tmp_path, engine, steps=2, advantages={"name": name, "filter_flat": filtered})
    assert run.run()
    # before training, and one or two a step
    assert engine.calls.count("generate") == 1 + 2 * (2 if name == "remax" else 1)
    for line in metrics(tmp_path):
        assert {"flat_groups/long", "flat_groups/short", "flat_in_every_objective"} <= line.keys()


@pytest.mark.parametrize("name", sorted(losses.losses()))
def test_a_run_of_two_steps_with_every_loss(tmp_path: Path, name: str) -> None:
    assert trainer(tmp_path, steps=2, loss={"name": name}).run()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


# -- where responses come from ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tis", "mask", "sequence"])
def test_the_built_in_generator_in_fp32_needs_no_correction_whatever_is_asked_for(
    tmp_path: Path, kind: str
) -> None:
    """The fake generator's log-probabilities differ from its trainer's as rounding never would."""
    none, asked = tmp_path / "none", tmp_path / kind
    for directory, correction in ((none, "none"), (asked, kind)):
        built = trainer(
            directory, algorithm={"correction": correction}, model={"dtype": "fp32"}, backend=Megatron
        )
        assert built.run()
    assert metrics(none) == metrics(asked)
    assert not any(name.startswith("correction/") for name in metrics(asked)[0])
    in_bf16 = tmp_path / "bf16"
    assert trainer(in_bf16, algorithm={"correction": kind}, model={"dtype": "bf16"}, backend=Megatron).run()
    assert metrics(in_bf16)[0]["correction/weight"] != 1.0


def test_a_run_on_servers_sends_weights_before_it_answers_and_after_every_step(tmp_path: Path) -> None:
    engine = TablePolicy()
    with table_server() as server:
        run = trainer(
            tmp_path,
            engine,
            steps=3,
            rollout={"backend": "vllm", "vllm": {"url": server.url, "start_timeout": 5}},
            backend=Vllm,
        )
        assert run.run()
        # Before the held-out answers, and with what each step but the last one changed.
        assert server.calls.count("/start_weight_update") == engine.streams == 3
    assert "generate" not in engine.calls
    for line in metrics(tmp_path):
        assert 0 < line["correction/weight"] <= 2 and line["logprob_difference/p999"] > 0
