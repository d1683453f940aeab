"""The sharded state dict of a model's parameters, for Megatron's layers and Transformer Engine's alike.

Every module of Transformer Engine has an ``_extra_state`` with FP8 scales, and this package does not train in
FP8. Megatron's own linear layers have an empty one, its norms and attention have none. Saving writes the
states that the layers have, and loading never requires them, so that a checkpoint of either kind of layers
loads into the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.gpt import GPTModel

from gapo_mega.engine.megatron.checkpoint.dist_format import METADATA

_EXTRA_STATE = "_extra_state"


def to_save(model: GPTModel) -> dict[str, Any]:
    """The model's sharded state dict, by names in ``model``; sharded tensors and objects know their keys."""
    entries: dict[str, Any] = model.sharded_state_dict(metadata=dict(METADATA))
    return entries


def to_load(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``to_save`` that a checkpoint must have."""
    return {name: entry for name, entry in entries.items() if not name.endswith(_EXTRA_STATE)}


def restore(model: GPTModel, loaded: Mapping[str, Any], left: tuple[str, ...] = ()) -> None:
    """Load entries into ``model``; parameters whose names start with one of ``left`` keep their values."""
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected, f"not the model's: {unexpected}"
    lost = [name for name in missing if not name.endswith(_EXTRA_STATE) and not name.startswith(left)]
    assert not lost, f"not loaded: {lost}"
