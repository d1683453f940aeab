"""Fields of config.json: none that changes the computation is passed over; transformers is the oracle."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from gapo_mega.models import families, shape_of
from gapo_mega.models.config_fields import DROPOUT, IDLE, NEUTRAL, READ
from gapo_mega.models.huggingface.config import read_config
from tests.helpers.tiny import (
    tiny_llama,
    tiny_mistral,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen3,
    tiny_qwen3_moe,
)

KINDS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
TINY = {
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mixtral": tiny_mixtral,
    "qwen3_moe": tiny_qwen3_moe,
}


def test_every_family_is_asked_about() -> None:
    assert families().keys() == KINDS.keys()


@pytest.mark.parametrize("family", KINDS)
def test_somebody_has_judged_every_field_of_the_installed_transformers(family: str) -> None:
    config = KINDS[family]()
    known = READ | NEUTRAL.keys() | IDLE | DROPOUT | families()[family].reads
    fields = {field.name for field in dataclasses.fields(config)} | config.to_dict().keys()
    assert fields - known == set()


def test_a_field_is_in_one_table_only() -> None:
    tables = [READ, NEUTRAL.keys(), IDLE, DROPOUT]
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize("family", KINDS)
def test_plain_configurations_are_taken_without_a_word(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    TINY[family](tmp_path)
    with caplog.at_level(logging.WARNING):
        shape_of(read_config(tmp_path))
    assert caplog.messages == []


def logits(directory: Path, **changes: Any) -> Tensor:
    """transformers' logits with entries of config.json changed."""
    with_changes(directory, **changes)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    tokens_BT = torch.arange(3, 63).view(2, 30)
    with torch.no_grad():
        found: Tensor = model(tokens_BT).logits
    return found


def with_changes(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


LAYERS = 4
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# Family, entries of config.json, the field that is refused. transformers computes something else with each.
REFUSED = [
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"is_causal": None}, "is_causal"),
    ("llama", {"is_causal": 0}, "is_causal"),
    ("mistral", {"is_causal": False}, "is_causal"),
    ("qwen2", {"is_causal": False}, "is_causal"),
    ("qwen3", {"is_causal": False}, "is_causal"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type"),
    ("llama", {"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_parameters.rope_type"),
    ("llama", {"rope_parameters": YARN}, "rope_parameters.rope_type"),
    ("qwen2", {"layer_types": None, **WINDOWED}, "use_sliding_window"),
    (
        "qwen2",
        {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["sliding_attention"] * LAYERS},
        "use_sliding_window",
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "changes", "field"), REFUSED)
def test_what_transformers_computes_otherwise_is_refused(
    family: str, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    TINY[family](tmp_path)
    plain = logits(tmp_path)
    changed = logits(tmp_path, **changes)
    # Attention in both directions changes logits by their own size, the mildest of these by 1 %.
    assert ((changed - plain).norm() / plain.norm()).item() > 5e-3
    with pytest.raises(ValueError, match=f"config.json {field}: found .*, accepted: "):
        shape_of(read_config(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"is_causal": True}),
        ("llama", {"pretraining_tp": 4}),
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"chunk_size_feed_forward": 2}),
        ("llama", {"hidden_act": "swish"}),
        ("llama", {"head_dim": 16, "use_cache": False, "is_decoder": True}),
        ("llama", {"layer_types": ["full_attention"] * LAYERS}),
        ("llama", {"quantization_config": None, "per_layer_config": {}}),
        ("llama", {"embedding_multiplier": 1.0, "rope_interleaved": False}),
        ("qwen2", {"attention_bias": False}),
        ("qwen2", {"sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {"layer_types": ["full_attention"] * LAYERS}),
        ("llama", {"architectures": None, "tie_last_hidden_states": True}),
    ],
)
def test_what_is_accepted_computes_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    TINY[family](tmp_path)
    plain = shape_of(read_config(tmp_path))
    assert torch.equal(logits(tmp_path), logits(tmp_path, **changes))
    assert shape_of(read_config(tmp_path)) == plain


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"sliding_window": 4}, "sliding_window: found 4, accepted: None"),
        ("llama", {"layer_types": ["sliding_attention"] * LAYERS}, "layer_types: found 'sliding_attention'"),
        ("mistral", {"sliding_window": 0}, "sliding_window: found 0"),
        ("llama", {"per_layer_config": {"1": {"intermediate_size": 64}}}, "per_layer_config"),
        ("llama", {"head_dim": 0}, "head_dim: found 0, accepted: 1 or more"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: found 0, accepted: 1 or more"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps: found -1.0, accepted: a number above 0"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": True}},
            "rope_theta: found True",
        ),
        ("llama", {"logits_scaling": 8.0}, "logits_scaling: found 8.0, accepted: None, 1.0"),
        ("llama", {"residual_multiplier": 0.22}, "residual_multiplier"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"add_cross_attention": True}, "add_cross_attention"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ("llama", {"architectures": ["LlamaBidirectionalModel"]}, "architectures"),
        ("llama", {"architectures": ["LlamaForQuestionAnswering"]}, "architectures"),
        ("llama", {"architectures": ["LlamaModel"]}, "architectures"),
        ("qwen2", {"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures"),
        ("llama", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor"),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 4]}}, "mrope_section"),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters.factor"),
    ],
)
def test_what_means_another_model_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    TINY[family](tmp_path)
    with_changes(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"config.json .*{message}"):
        shape_of(read_config(tmp_path))


@pytest.mark.parametrize(
    "changes", [{"a_field_of_tomorrow": 3}, {"attention_dropout": 0.25}, {"resid_pdrop": 0.125}]
)
def test_unknown_fields_and_dropout_are_said_once(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_llama(tmp_path)
    with_changes(tmp_path, **changes)
    for _ in range(2):
        shape_of(read_config(tmp_path))
    (field, value), *_ = changes.items()
    assert [message.split(";")[0].split(",")[0] for message in caplog.messages] == [
        f"config.json {field}: found {value!r}"
    ]
