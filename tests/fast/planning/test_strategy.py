"""Settings of gradient strategies: what `auto` comes to, what is refused, and how often the model is run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gapo_mega import advantages
from gapo_mega.config import Config, strategies
from gapo_mega.config.loading import dump, load
from gapo_mega.config.strategies import PassCount
from gapo_mega.models import ModelShape
from gapo_mega.planning.backwards import backwards_of_run
from gapo_mega.planning.layout import check_gradients
from gapo_mega.planning.strategy import forward_kind, microbatches
from tests.helpers.resolved import resolved_run

SHAPE = ModelShape("llama", 4, 8, 16, 2, 2, 4, 64, False, 1e4, 1e-5, False, 64)


def raw(gradients: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Sixteen sequences a step; by default in one microbatch."""
    return {
        "output_dir": "o",
        "micro_batch_size": 16,
        "model": {"path": "m"},
        "data": {"source": "s"},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2},
        "objectives": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
        "gradients": gradients,
        **sections,
    }


def config(gradients: dict[str, Any], **sections: Any) -> Config:
    return Config.model_validate(raw(gradients, **sections))


@pytest.mark.parametrize(
    ("gradients", "sections", "data", "expected"),
    [
        ({}, {}, 1, "one_pass"),
        ({}, {"micro_batch_size": 4}, 2, "one_pass"),
        ({"metric": "adam"}, {}, 1, "one_pass"),
        ({}, {"parallel": {"pipeline": 2}}, 1, "one_pass"),
        # Clipped ratios, which the last stage of a pipeline alone sees, begin with the second update.
        ({}, {"parallel": {"pipeline": 2}, "algorithm": {"ppo_epochs": 2}}, 1, "separate"),
        (
            {},
            {"parallel": {"pipeline": 2}, "algorithm": {"minibatches": 2}, "micro_batch_size": 8},
            1,
            "separate",
        ),
        ({}, {"parallel": {"pipeline": 2}, "algorithm": {"entropy_beta": 0.01}}, 1, "separate"),
        ({}, {"algorithm": {"entropy_beta": 0.01}}, 1, "one_pass"),
        ({}, {"algorithm": {"ppo_epochs": 2}}, 1, "one_pass"),
        ({}, {"objectives": [{"name": "a"}]}, 1, "shared"),
        ({"forward": "one_pass"}, {"objectives": [{"name": "a"}]}, 1, "one_pass"),
        ({"forward": "shared"}, {"micro_batch_size": 4}, 2, "shared"),
        ({"store_dtype": "bf16"}, {"micro_batch_size": 4}, 1, "separate"),
        ({"store": "single"}, {"micro_batch_size": 4}, 1, "separate"),
        ({"scope": "last_layer"}, {}, 1, "shared"),
        ({"scope": "last_layer"}, {"micro_batch_size": 4}, 1, "separate"),
        ({"scope": "last_block"}, {"model": {"path": "m", "recompute": "full"}}, 1, "separate"),
    ],
)
def test_auto(gradients: dict[str, Any], sections: dict[str, Any], data: int, expected: str) -> None:
    assert forward_kind(config(gradients, **sections), data) == expected


@pytest.mark.parametrize(
    ("sections", "data", "expected"),
    [
        ({}, 1, "shared"),
        ({"micro_batch_size": 4}, 1, "shared"),  # in turns, nothing to reduce
        ({"micro_batch_size": 8}, 2, "shared"),  # one microbatch a rank
        ({"micro_batch_size": 4}, 2, "separate"),  # would reduce twice as often
        ({"parallel": {"pipeline": 2}}, 1, "separate"),
    ],
)
def test_auto_with_advantages_of_tokens(sections: dict[str, Any], data: int, expected: str) -> None:
    assert forward_kind(config({}, **sections), data, by_token=True) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rloo", "one_pass"), ("grpo", "one_pass"), ("reinforce_pp", "shared"), ("remax", "shared")],
)
def test_auto_asks_the_estimator_whether_advantages_are_of_tokens(name: str, expected: str) -> None:
    run = resolved_run(config({}, advantages={"name": name}), shape=SHAPE)
    assert dataclasses.replace(run, estimator=advantages.build(name)).forward == expected


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ({"forward": "separate"}, PassCount(3, 3)),
        ({"forward": "shared"}, PassCount(1, 3)),
        ({"forward": "one_pass"}, PassCount(1, 1)),
        ({}, PassCount(1, 1)),
        ({"store": "single", "forward": "separate"}, PassCount(7, 7)),
        ({"store": "single", "forward": "shared"}, PassCount(1, 7)),
        ({"scope": "last_layer", "forward": "shared"}, PassCount(1, 1)),
        ({"scope": "last_layer", "forward": "separate"}, PassCount(2, 1)),
        ({"scope": [[0, 1]], "forward": "separate"}, PassCount(4, 1)),
    ],
)
def test_passes(gradients: dict[str, Any], expected: PassCount) -> None:
    assert resolved_run(config(gradients), shape=SHAPE).passes == expected


@pytest.mark.parametrize(
    ("gradients", "sections", "named"),
    [
        (
            {"store": "single", "scope": "last_layer"},
            {},
            "gradients.scope: found last_layer with store single",
        ),
        ({"store": "single", "store_dtype": "bf16"}, {}, "gradients.store_dtype: found bf16"),
        ({"scope": "last_block", "store_dtype": "bf16"}, {}, "gradients.store_dtype: found bf16"),
        ({"metric": "adam", "scope": "last_layer"}, {}, "gradients.metric: found adam"),
        ({"actual_change": True, "store": "single"}, {}, "gradients.actual_change: found true"),
        ({"scope": [[2, 1]]}, {}, "gradients.scope: found"),
        ({"scope": [[0, 2], [1, 3]]}, {}, "gradients.scope: found"),
        ({"scope": []}, {}, "gradients.scope: found"),
        ({"metric": "adam"}, {"optimizer": {"name": "sgd", "distributed": False}}, "optimizer.name sgd"),
        ({"forward": "shared"}, {"parallel": {"pipeline": 2}}, "parallel.pipeline 2"),
    ],
)
def test_refused_by_the_configuration(
    gradients: dict[str, Any], sections: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError, match="accepted") as caught:
        config(gradients, **sections)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("gradients", "sections", "named"),
    [
        ({"scope": [[3, 5]]}, {}, "the model's 4 layers"),
        (
            {"forward": "shared", "store_dtype": "bf16"},
            {"micro_batch_size": 4},
            "4 microbatches and store_dtype",
        ),
        (
            {"forward": "shared", "store": "single"},
            {"micro_batch_size": 4},
            "4 microbatches and store single",
        ),
        ({"forward": "shared", "scope": "last_layer"}, {"micro_batch_size": 8}, "2 microbatches and scope"),
        (
            {"forward": "shared", "scope": [[0, 2]]},
            {"model": {"path": "m", "recompute": "selective"}},
            "model.recompute selective",
        ),
    ],
)
def test_refused_for_a_model_and_batch(
    gradients: dict[str, Any], sections: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        check_gradients(config(gradients, **sections), SHAPE, 1)


def measures_change(settings: Config) -> bool:
    return strategies.chosen(settings.gradients).measures_change


def test_the_change_is_measured_with_the_metric_where_it_can_be() -> None:
    assert not measures_change(config({}))
    assert measures_change(config({"actual_change": True}))
    assert measures_change(config({"metric": "adam"}))
    assert not measures_change(config({"metric": "adam", "actual_change": False}))
    assert not measures_change(config({"metric": "adam", "store": "single"}))
    assert not measures_change(config({"metric": "adam", "scope": [[0, 2]]}))


def test_layer_ranges_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw({"scope": [[0, 2], [3, 4]]})))
    loaded = load(tmp_path / "c.yaml")
    dump(loaded, tmp_path / "again.yaml")
    assert loaded.gradients.scope == load(tmp_path / "again.yaml").gradients.scope == [[0, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"gradients\.scope"):
        load(tmp_path / "c.yaml", ["gradients.scope=[[0, 2, 3]]"])


@pytest.mark.parametrize(
    ("losses", "forwards", "backwards"),
    [({}, 3, 3), ({"router_z_loss": 0.1}, 4, 4), ({"router_aux_loss": 0.1, "router_z_loss": 0.1}, 5, 4)],
)
def test_losses_of_routers_have_passes_of_their_own(
    losses: dict[str, float], forwards: int, backwards: int
) -> None:
    chosen = config({"forward": "separate"}, model={"path": "m", **losses})
    resolved = resolved_run(chosen, shape=SHAPE)
    assert resolved.passes == PassCount(forwards, backwards)
    assert backwards_of_run(chosen, 5) == 5 * backwards


def test_packed_microbatches_are_planned_for_the_longest_sequences() -> None:
    """Of 16 sequences of at most 60 tokens: three in a row of 200, and all in one of 960."""
    lengths = {"data": {"source": "s", "max_prompt_tokens": 40}}
    rollout = {"prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 20}

    def packed(tokens: int, **gradients: Any) -> Config:
        return config(gradients, micro_batch_tokens=tokens, rollout=rollout, **lengths)

    for tokens, count in ((60, 16), (119, 16), (120, 8), (200, 6), (959, 2), (960, 1)):
        assert microbatches(packed(tokens), 1) == count
    assert microbatches(packed(200), 2) == 3
    stages = {"pipeline": 4, "virtual_pipeline": 2}
    assert (
        microbatches(config({}, micro_batch_tokens=960, rollout=rollout, parallel=stages, **lengths), 1) == 4
    )
    assert forward_kind(packed(200), 2) == "one_pass"
    assert forward_kind(packed(960), 1, by_token=True) == "shared"
    assert forward_kind(packed(959), 2, by_token=True) == "shared"
    assert forward_kind(packed(200), 2, by_token=True) == "separate"
    with pytest.raises(
        ValidationError, match=r"micro_batch_tokens: found 59, accepted: null, or at least .*60"
    ):
        packed(59)
