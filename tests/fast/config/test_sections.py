"""Settings of one section that need each other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from gapo_mega.config import Config, OptimizerConfig, ParallelConfig, Section
from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig

MINIMAL: dict[str, Any] = {"output_dir": "o", "model": {"path": "m"}, "data": {"source": "s"}}


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (
            ParallelConfig,
            {"virtual_pipeline": 2},
            "parallel.virtual_pipeline: found 2 with parallel.pipeline 1; it needs pipeline >= 2",
        ),
        (
            OptimizerConfig,
            {"overlap_param_gather": True},
            "optimizer.overlap_param_gather: found true with overlap_grad_reduce false, accepted: false (it "
            "needs optimizer.distributed and optimizer.overlap_grad_reduce)",
        ),
        (
            OptimizerConfig,
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed": False},
            "optimizer.overlap_param_gather: found true with distributed false, accepted: false (it needs "
            "optimizer.distributed and optimizer.overlap_grad_reduce)",
        ),
    ],
)
def test_what_lacks_something_is_refused(
    section: type[Section], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        section.model_validate(fields)
    (error,) = caught.value.errors()
    assert error["msg"] == f"Value error, {message}"


def test_what_has_all_is_accepted() -> None:
    assert ParallelConfig(pipeline=2, virtual_pipeline=3).virtual_pipeline == 3
    assert OptimizerConfig(overlap_grad_reduce=True, overlap_param_gather=True).overlap_param_gather


def objectives(count: int, *more: str) -> list[dict[str, str]]:
    return [{"name": name} for name in [*(f"o{i}" for i in range(count)), *more]]


@pytest.mark.parametrize("kl", ["objective", "apart"])
def test_the_kl_row_needs_its_name_and_room(kl: str) -> None:
    algorithm = {"kl": kl}
    taken = f"found the name kl with algorithm.kl {kl}, accepted: another name"
    with pytest.raises(ValidationError, match=taken):
        Config.model_validate({**MINIMAL, "objectives": objectives(1, "kl"), "algorithm": algorithm})
    with pytest.raises(ValidationError, match=f"found 16 with algorithm.kl {kl}, accepted: up to 15"):
        Config.model_validate({**MINIMAL, "objectives": objectives(16), "algorithm": algorithm})
    config = Config.model_validate({**MINIMAL, "objectives": objectives(15), "algorithm": algorithm})
    assert config.rows == (*(f"o{i}" for i in range(15)), "kl")
    assert config.aggregated == (config.rows if kl == "objective" else config.rows[:-1])


def test_an_audited_update_has_one_row_more_than_objectives() -> None:
    run = {**MINIMAL, "scalarization": {"name": "gdpo"}, "gradients": {"audit_every": 2}}
    with pytest.raises(ValidationError, match=r"found 16 with gradients\.audit_every 2, accepted: up to 15"):
        Config.model_validate({**run, "objectives": objectives(16)})
    assert len(Config.model_validate({**run, "objectives": objectives(15)}).audited_rows) == 16
    assert Config.model_validate({**run, "objectives": objectives(16), "gradients": {}}).rows == ("gdpo",)


@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_without_a_kl_row_nothing_is_taken(kl: str) -> None:
    section = {"objectives": objectives(15, "kl"), "algorithm": {"kl": kl}}
    config = Config.model_validate({**MINIMAL, **section})
    assert config.rows == config.aggregated == (*(f"o{i}" for i in range(15)), "kl")


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"kl": "objective", "kl_target": 6}, "found 6.0 with kl objective, accepted: none"),
        ({"kl_beta": 0, "kl_target": 6}, "found 6.0 with kl_beta 0, accepted: none, or"),
    ],
)
def test_a_kl_target_needs_a_coefficient_to_steer(algorithm: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({**MINIMAL, "objectives": objectives(1), "algorithm": algorithm})
    assert f"algorithm.kl_target: {said}" in str(caught.value)


def test_a_safe_scalarizer_has_the_rows_of_the_objectives() -> None:
    safe = {"name": "ctwa", "options": {"safe": True}}
    run = {**MINIMAL, "scalarization": safe, "objectives": objectives(2)}
    assert Config.model_validate(run).rows == ("o0", "o1")
    assert Config.model_validate({**run, "algorithm": {"kl": "apart"}}).rows == ("o0", "o1", "kl")
    averaged = Config.model_validate({**run, "aggregation": {"average": 0.9, "average_dtype": "bf16"}})
    assert averaged.one_signal is None and averaged.aggregated == ("o0", "o1")
    plain = Config.model_validate({**run, "scalarization": {"name": "ctwa", "options": {"safe": False}}})
    assert plain.rows == ("ctwa",)
    # An objective may be called as the scalarizer is: it has no gradient of its own.
    assert Config.model_validate({**run, "objectives": objectives(1, "ctwa")}).rows == ("o0", "ctwa")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"aggregation": {"name": "mgda"}},
            "aggregation: found mgda or its options beside scalarization ctwa",
        ),
        (
            {"aggregation": {"options": {"rates": "adaptive"}}},
            "aggregation: found gapo or its options beside scalarization ctwa with scalarization.options."
            "safe, accepted: average and average_dtype alone",
        ),
        ({"algorithm": {"kl": "objective"}}, "algorithm.kl: found objective with scalarization ctwa and"),
        (
            {"gradients": {"audit_every": 2}},
            "gradients.audit_every: found 2 with scalarization.options.safe, accepted: 0",
        ),
        (
            {"aggregation": {"average": 0.5}, "gradients": {"store": "single"}},
            "aggregation.average: found 0.5 with gradients.store single",
        ),
    ],
)
def test_what_a_safe_scalarizer_rules_out(section: dict[str, Any], said: str) -> None:
    safe = {"name": "ctwa", "options": {"safe": True}}
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({**MINIMAL, "objectives": objectives(2), "scalarization": safe, **section})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"evaluation": {"every_steps": 2}, "data": {"source": "s", "heldout_prompts": 0}},
            "evaluation.every_steps: found 2 with data.heldout_prompts 0, accepted: 0, or held-out prompts",
        ),
        (
            {"evaluation": {"every_steps": 2, "early_stopping_patience": 3}},
            "evaluation.early_stopping_patience: found 3 without checkpoint.best, accepted: null, or "
            "checkpoint.best, which says what counts as better",
        ),
        (
            {"evaluation": {"every_steps": 2}, "checkpoint": {"best": "o3"}},
            "checkpoint.best: found 'o3', accepted: null, o0, worst_gain, hypervolume",
        ),
        (
            {"checkpoint": {"best": "worst_gain"}},
            "checkpoint.best: found worst_gain with evaluation.every_steps 0, accepted: null, or "
            "evaluation.every_steps above 0 (the best is chosen among these evaluations)",
        ),
        (
            {
                "objectives": objectives(1, "worst_gain"),
                "evaluation": {"every_steps": 2},
                "checkpoint": {"best": "worst_gain"},
            },
            "checkpoint.best: found worst_gain, which is both an objective and a measure of all of them; "
            "accepted: another name of that objective",
        ),
    ],
)
def test_evaluations_that_could_decide_nothing(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({**MINIMAL, "objectives": objectives(1), **sections})
    (error,) = caught.value.errors()
    assert error["msg"] == f"Value error, {message}"


@pytest.mark.parametrize("best", ["o1", "worst_gain", "hypervolume"])
def test_evaluations_that_choose(best: str) -> None:
    evaluation = {"every_steps": 2, "early_stopping_patience": 1}
    sections = {"evaluation": evaluation, "checkpoint": {"best": best}}
    found = Config.model_validate({**MINIMAL, "objectives": objectives(2), **sections})
    assert found.checkpoint.best == best and found.checkpoint.keep == 2


@pytest.mark.parametrize("kind", [SftConfig, RewardModelConfig, PairsConfig])
def test_runs_on_data_choose_no_best_and_have_no_responses(kind: type[Section]) -> None:
    for section, field in (("checkpoint", "best"), ("logging", "responses")):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({**MINIMAL, section: {field: 1}})
        assert any(
            (error["type"], error["loc"][:2]) == ("extra_forbidden", (section, field))
            for error in caught.value.errors()
        )


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"correction_range": [5.0, 0.5]},
            "algorithm.correction_range: found [5.0, 0.5], accepted: the least ratio before the greatest",
        ),
        (
            {"correction": "mask", "old_logprobs": "generator"},
            "algorithm.correction: found mask with algorithm.old_logprobs generator, accepted: auto, none "
            "(the rollout's log-probabilities are then the trainer's too: the loss's own ratio is between "
            "policy and rollout)",
        ),
    ],
)
def test_a_correction_that_corrects_nothing_is_refused(algorithm: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({**MINIMAL, "objectives": objectives(2), "algorithm": algorithm})
    assert [error["msg"] for error in caught.value.errors()] == [f"Value error, {message}"]


@pytest.mark.parametrize("bounds", [[0.5], [0.5, 1.0, 2.0], [0.0, 2.0], [-1.0, 2.0], "1"])
def test_the_range_of_a_correction_has_two_ratios(bounds: Any) -> None:
    sections = {"objectives": objectives(2), "algorithm": {"correction_range": bounds}}
    with pytest.raises(ValidationError, match="correction_range"):
        Config.model_validate({**MINIMAL, **sections})
