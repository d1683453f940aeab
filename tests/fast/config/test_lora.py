"""The section ``model.lora``, and what goes with it."""

from __future__ import annotations

from typing import Any

import pytest

from gapo_mega.config import Config
from gapo_mega.config.loading import parse
from gapo_mega.config.lora import TARGET_MODULES
from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig, SupervisedConfig

MINIMAL: dict[str, Any] = {
    "output_dir": "o",
    "data": {"source": "s"},
    "objectives": [{"name": "a", "kind": "python", "function": "m:f"}],
}


def read(lora: Any, **sections: Any) -> Config:
    model = {"path": "m", "lora": lora, **sections.pop("model", {})}
    return parse({**MINIMAL, "model": model, **sections}, [], Config, "run.yaml")


def test_defaults_adapt_every_linear_layer() -> None:
    lora = read({}).model.lora
    assert lora is not None
    assert lora.targets == TARGET_MODULES and lora.scale == 2.0 and lora.path is None
    assert read(None).model.lora is None


def test_targets_have_one_order_and_scales_are_pefts() -> None:
    lora = read({"target_modules": ["down_proj", "q_proj"], "rank": 4, "alpha": 6.0}).model.lora
    assert lora is not None and lora.targets == ("q_proj", "down_proj") and lora.scale == 1.5
    stable = read({"rank": 4, "alpha": 6.0, "rank_stabilized": True}).model.lora
    assert stable is not None and stable.scale == 3.0


@pytest.mark.parametrize(
    ("lora", "sections", "message"),
    [
        ({"target_modules": []}, {}, r"model.lora.target_modules: found \[\], accepted: all-linear, or at"),
        ({"target_modules": ["q_proj", "q_proj"]}, {}, "model.lora.target_modules: found .* each once"),
        ({"target_modules": ["lm_head"]}, {}, "model.lora.target_modules"),
        ({"target_modules": "all"}, {}, "model.lora.target_modules"),
        ({"rank": 0}, {}, "model.lora.rank: found 0"),
        ({"alpha": 0.0}, {}, "model.lora.alpha: found 0"),
        ({"dropout": 0.1}, {}, "model.lora.dropout"),
        ({}, {"model": {"offload_reference": True}}, "model.offload_reference: found true with model.lora"),
        ({}, {"gradients": {"scope": "last_layer"}}, "gradients.scope: found last_layer with model.lora"),
        ({}, {"gradients": {"scope": "last_block"}}, "gradients.scope: found last_block with model.lora"),
        (None, {"checkpoint": {"export_adapter": True}}, "checkpoint.export_adapter: found true without"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(lora: Any, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(lora, **sections)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [SftConfig, RewardModelConfig, PairsConfig])
def test_runs_without_rollouts_have_them_too(kind: type[SupervisedConfig]) -> None:
    rows = {"source": "s"}
    sections = {"objectives": [{"name": "a", "data": rows}]} if kind is PairsConfig else {"data": rows}

    def with_rank(rank: int) -> SupervisedConfig:
        model = {"path": "m", "lora": {"rank": rank}}
        return parse({"output_dir": "o", "model": model, **sections}, [], kind, "run.yaml")

    def exporting(**model: Any) -> SupervisedConfig:
        found = {"output_dir": "o", "model": {"path": "m", **model}, "checkpoint": {"export_adapter": True}}
        return parse({**found, **sections}, [], kind, "run.yaml")

    assert exporting(lora={}).checkpoint.export_adapter
    with pytest.raises(ValueError, match=r"checkpoint\.export_adapter: found true without model\.lora"):
        exporting()
    with pytest.raises(ValueError, match=r"found true with model.keep_layers 1|keep_layers: found 1"):
        exporting(lora={}, keep_layers=1)
    lora = with_rank(4).model.lora
    assert lora is not None and lora.rank == 4
    with pytest.raises(ValueError, match=r"model\.lora\.rank"):
        with_rank(0)
