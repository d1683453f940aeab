"""Packaged configurations of well-known models, for plans and dry runs without a network.

A card has the fields of ``config.json`` that a shape needs, and says where they are from. Nothing is trained
from a card: a run reads the model itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import CONFIG_MAPPING, PreTrainedConfig

from gapo_mega.files import local


@dataclass(frozen=True)
class Card:
    """What is known of a model that is not on this machine.

    Attributes:
        name: repository on the hub.
        parameters: number of its parameters, as published; of a score model without its normaliser.
        file: of the package, which also says where the fields are from.
        fields: of its ``config.json``.
    """

    name: str
    parameters: int
    file: str
    fields: dict[str, Any]

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration as transformers reads it."""
        kind = CONFIG_MAPPING[self.fields["model_type"]]
        config: PreTrainedConfig = kind.from_dict(dict(self.fields))
        return config

    def __str__(self) -> str:
        return f"{self.name} is not on this machine: its shape is that of the packaged card {self.file}"


@cache
def cards() -> dict[str, Card]:
    """Every packaged card by the name of its model."""
    folder = resources.files("gapo_mega.models") / "cards"
    found: dict[str, Card] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        content = json.loads(file.read_text(encoding="utf-8"))
        for name in content["names"]:
            place = f"{folder.name}/{file.name}"
            found[name] = Card(name, content["parameters"], place, content["config"])
    return found


def card_of(name: str) -> Card | None:
    """The card of a hub name; None where there is none, or where the model itself can be read here."""
    card = cards().get(name)
    if (
        card is None
        or os.path.exists(local(name))
        or isinstance(try_to_load_from_cache(name, "config.json"), str)
    ):
        return None
    return card
