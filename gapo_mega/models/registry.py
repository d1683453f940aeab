"""Finds the families in ``families/``: one file, one family, nothing to register."""

from __future__ import annotations

from transformers import PreTrainedConfig

import gapo_mega.models.families as package
from gapo_mega.models.config_fields import check_fields
from gapo_mega.models.family import Family
from gapo_mega.models.shape import ModelShape
from gapo_mega.registry import implementations


def families() -> dict[str, Family]:
    """Every ``Family`` that a file of ``families/`` defines, by its ``model_type``."""
    return {family.model_type: family() for family in implementations(package, Family)}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a Hugging Face configuration. Raises ``ValueError`` when there is none."""
    known = families()
    for family in known.values():
        if family.matches(config):
            return family
    raise ValueError(
        f"model.path: found model_type {config.model_type!r}, accepted: {', '.join(sorted(known))}"
    )


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The facts of a model from its Hugging Face configuration.

    Raises:
        ValueError: what ``check_fields`` or the family's ``shape`` refuses.
    """
    family = family_of(config)
    check_fields(config, family.reads)
    return family.shape(config)
