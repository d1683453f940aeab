"""A model's parameters as a checkpoint's entries, whatever made its layers.

Transformer Engine's modules have an ``_extra_state`` each: the scales of FP8, which this package does not
train in. Megatron's own linear layers have one that is empty, its norms and attention have none. They are
written where the layers offer them and never asked for, so that a checkpoint of either kind of layers loads
into the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.gpt import GPTModel

from gapo_mega.engine.megatron.checkpoint.dist_format import METADATA

_EXTRA_STATE = "_extra_state"


def to_save(model: GPTModel) -> dict[str, Any]:
    """All entries, by the name that they have in ``model``; tensors and objects know their global key."""
    entries: dict[str, Any] = model.sharded_state_dict(metadata=dict(METADATA))
    return entries


def to_load(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``to_save`` that a checkpoint must have."""
    return {name: entry for name, entry in entries.items() if not name.endswith(_EXTRA_STATE)}


def restore(model: GPTModel, loaded: Mapping[str, Any], left: tuple[str, ...] = ()) -> None:
    """Put loaded entries into ``model``; names that begin with one of ``left`` keep their values."""
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected, f"not the model's: {unexpected}"
    lost = [name for name in missing if not name.endswith(_EXTRA_STATE) and not name.startswith(left)]
    assert not lost, f"not loaded: {lost}"
