"""Score heads: what a configuration may say of one, and that anything else is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from gapo_mega.models.score_head import require_language_model, score_head_of

CLASSIFIER = "LlamaForSequenceClassification"
BEAVER = "LlamaModelForScore"


def config(architecture: str | None, **fields: Any) -> LlamaConfig:
    architectures = None if architecture is None else [architecture]
    return LlamaConfig(**{"vocab_size": 101, "num_labels": 1, "architectures": architectures, **fields})


@pytest.mark.parametrize(("pad", "skipped"), [(None, None), (-1, None), (0, 0), (100, 100)])
def test_the_padding_id_that_is_skipped(pad: int | None, skipped: int | None) -> None:
    head = score_head_of(config(CLASSIFIER, pad_token_id=pad), [])
    assert head is not None and head.skip_padding_id == skipped


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        (CLASSIFIER, {"pad_token_id": 101}, "pad_token_id: found 101, accepted: null, or 0 to 100"),
        (CLASSIFIER, {"pad_token_id": -2}, "pad_token_id: found -2"),
        (CLASSIFIER, {"num_labels": 2}, "num_labels: found 2, accepted: 1"),
        (BEAVER, {"score_dim": 3}, "score_dim: found 3, accepted: 1"),
        (BEAVER, {"score_type": "helpful"}, "score_type: found 'helpful', accepted: 'reward', 'cost'"),
        (BEAVER, {"do_normalize": "false"}, "do_normalize: found 'false', accepted: True, False"),
    ],
)
def test_other_heads_are_refused(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"config.json {message}"):
        score_head_of(config(architecture, **fields), [])


@pytest.mark.parametrize("architecture", [CLASSIFIER, BEAVER, "LlamaForScore"])
def test_a_score_model_is_no_language_model(architecture: str) -> None:
    with pytest.raises(
        ValueError, match=f"^model.path: found the score model {architecture}, accepted: a lang"
    ):
        require_language_model(config(architecture))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", None])
def test_a_language_model_is_one(architecture: str | None) -> None:
    require_language_model(config(architecture))
    assert score_head_of(config(architecture), []) is None
