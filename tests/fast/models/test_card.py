"""Packaged cards: shapes of the published sizes, used only where a model is not on this machine."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from gapo_mega.models.card import card_of, cards
from gapo_mega.models.config_fields import READ
from gapo_mega.models.registry import shape_of
from tests.helpers.tiny import tiny_llama

PAPER = [
    "HuggingFaceH4/mistral-7b-sft-beta",
    "PKU-Alignment/beaver-7b-v1.0-reward",
    "PKU-Alignment/beaver-7b-v1.0-cost",
]


def test_the_papers_models_and_a_dozen_others_have_cards() -> None:
    assert set(PAPER) <= set(cards()) and len(cards()) > 15


@pytest.mark.parametrize("name", sorted(cards()))
def test_the_shape_has_as_many_parameters_as_were_published(name: str) -> None:
    """Counted by transformers' own classes, without memory for them; a score model has its head on top."""
    import torch

    card = cards()[name]
    config = card.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    if card.fields["architectures"] == ["LlamaForScore"]:
        counted += (config.hidden_size + 1) - config.vocab_size * config.hidden_size
    assert counted == card.parameters
    shape = shape_of(config)
    assert shape.longest >= 512  # the paper's sequences
    assert shape.vocab == card.fields["vocab_size"]


def test_cards_have_fields_that_shapes_read_and_say_where_they_are_from() -> None:
    folder = resources.files("gapo_mega.models") / "cards"
    known = READ | {"rope_theta", "rope_scaling", "sliding_window", "use_sliding_window"}
    for file in folder.iterdir():
        content = json.loads(file.read_text(encoding="utf-8"))
        assert set(content) == {"names", "parameters", "source", "config"}
        assert set(content["config"]) <= known, file.name
        assert len(content["source"].split()) >= 5, file.name


def test_the_card_of_the_model_that_is_here_agrees_with_its_file(smollm2: Path) -> None:
    own = json.loads((smollm2 / "config.json").read_text())
    card = shape_of(cards()["HuggingFaceTB/SmolLM2-135M-Instruct"].config)
    assert card == shape_of(LlamaConfig.from_dict(own))


def test_a_model_on_this_machine_is_read_and_not_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mistralai/Mistral-7B-v0.1"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert card_of(name) is not None
    assert card_of("mistralai/another") is None
    monkeypatch.chdir(tmp_path)
    tiny_llama(Path(name))
    assert card_of(name) is None


def test_a_model_in_the_hubs_cache_is_read_and_not_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "mistralai/Mistral-7B-v0.1"
    assert card_of(name) is not None
    folder = tmp_path / "models--mistralai--Mistral-7B-v0.1"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    assert card_of(name) is None
