"""Score models: a language model's backbone whose output layer gives one number per position."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from gapo_mega.models.config_fields import SAFE_RLHF, require
from gapo_mega.models.mapping import OUTPUT_LAYER, Rule, WeightMap
from gapo_mega.models.registry import families
from gapo_mega.models.shape import ModelShape

OUTPUT_BIAS = "output_layer.bias"
KEPT = "hf."  # prefix of tensors that a checkpoint keeps for the way back, although Megatron has none such
_CLASSIFIER = "ForSequenceClassification"
_NORMALIZER = "normalizer."


@dataclass(frozen=True)
class ScoreHead:
    """How a score model turns the last token's hidden state into its score.

    Attributes:
        weight: Hugging Face name of the ``[1, hidden]`` projection.
        bias: name of its bias, if it has one.
        statistics: tensors of a normaliser, kept through a conversion.
        normalize: ``affine`` subtracts the stored mean and divides by the stored standard deviation,
            ``scale`` divides only.
        is_cost: the score is a cost, lower is better.
        skip_padding_id: the score is taken at the last token that is not this one, as transformers'
            classifiers do; ``None``: at the last token.
    """

    weight: str
    bias: str | None = None
    statistics: tuple[str, ...] = ()
    normalize: str | None = None
    is_cost: bool = False
    skip_padding_id: int | None = None


def score_head_of(config: PreTrainedConfig, names: Collection[str]) -> ScoreHead | None:
    """The score head that a directory's configuration and tensor names describe, ``None`` for others.

    It knows transformers' ``*ForSequenceClassification`` with one label, and the score models of
    safe-rlhf (https://github.com/PKU-Alignment/safe-rlhf), such as the beaver reward and cost models.

    Raises:
        ValueError: more than one label or score dimension, another kind of score, or a padding id outside the
            vocabulary.
    """
    settings: dict[str, Any] = config.to_dict()
    architecture = str((config.architectures or ["none"])[0])
    if architecture.endswith(_CLASSIFIER):
        _require_one("num_labels", config.num_labels)
        return ScoreHead("score.weight", skip_padding_id=_padding_id(config))
    if not architecture.endswith(SAFE_RLHF):
        return None
    _require_one("score_dim", settings.get("score_dim", 1))
    require("score_type", settings.get("score_type", "reward"), "reward", "cost")
    require("do_normalize", settings.get("do_normalize", False), True, False)
    is_cost = settings.get("score_type") == "cost"
    normalize = ("scale" if is_cost else "affine") if settings.get("do_normalize", False) else None
    return ScoreHead(
        "score_head.weight",
        bias="score_head.bias" if "score_head.bias" in names else None,
        statistics=tuple(sorted(name for name in names if name.startswith(_NORMALIZER))),
        normalize=normalize,
        is_cost=is_cost,
    )


def require_language_model(config: PreTrainedConfig, parameter: str = "model.path") -> None:
    """Raise ``ValueError``, beginning with ``parameter``, for the configuration of a score model."""
    name = str((config.architectures or ["none"])[0])
    if name.endswith((_CLASSIFIER, *SAFE_RLHF)):
        raise ValueError(f"{parameter}: found the score model {name}, accepted: a language model")


def weight_map_of(
    shape: ModelShape,
    head: ScoreHead | None,
    tensor: int = 1,
    padded_vocab: int | None = None,
    expert_tensor: int | None = None,
) -> WeightMap:
    """The conversion of a language model's weights, or of a score model's; see ``WeightMap``.

    A score model's output layer is its head.
    """
    family = families()[shape.family]
    if head is None:
        return family.weight_map(shape, tensor, padded_vocab, expert_tensor)
    table = {**family.table, OUTPUT_LAYER: Rule("replicated", (head.weight,))}
    if head.bias is not None:
        table[OUTPUT_BIAS] = Rule("replicated", (head.bias,))
    return WeightMap(replace(shape, tied=False), table, tensor, padded_vocab, expert_tensor)


def _padding_id(config: PreTrainedConfig) -> int | None:
    """The id that transformers skips at the end of a row. Old Llama checkpoints say -1, which means none."""
    found = config.pad_token_id
    if found is None or found == -1:
        return None
    if not 0 <= found < config.vocab_size:
        raise ValueError(
            f"config.json pad_token_id: found {found}, accepted: null, or 0 to {config.vocab_size - 1} "
            f"(vocab_size {config.vocab_size})"
        )
    return int(found)


def _require_one(field: str, found: object) -> None:
    if found != 1:
        raise ValueError(f"config.json {field}: found {found!r}, accepted: 1 (one score per text)")
