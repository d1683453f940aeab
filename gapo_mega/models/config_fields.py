"""Every field of config.json that we know: read, accepted with some values only, or without effect.

A field in none of these tables may change what a model computes. transformers' classes do not read it either,
so it does not stop a run, but the log names it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

logger = logging.getLogger(__name__)

SAFE_RLHF = ("ForScore", "ModelForScore")  # endings of safe-rlhf's classes

# ``families.family.llama_like``, ``score_head_of`` and this file read these.
READ = frozenset(
    {
        "architectures",
        "auto_map",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_labels",
        "pad_token_id",
        "rms_norm_eps",
        "rope_parameters",  # transformers makes it of rope_theta, rope_scaling and partial_rotary_factor
        "tie_word_embeddings",
        "vocab_size",
        # of safe-rlhf's score models
        "do_normalize",
        "score_dim",
        "score_type",
    }
)

_OFF = (False, None)
_NONE_OF_THEM = (None, 0)
_ONE = (None, 1.0)

# Fields that change what is computed, with the values that mean what we compute. A family that reads one of
# them itself says so in ``Family.reads``.
NEUTRAL: dict[str, tuple[object, ...]] = {
    # who attends to whom
    "is_causal": (True,),  # transformers takes null for false
    "causal": (True, None),
    "use_bidirectional_attention": _OFF,
    "is_bidirectional": _OFF,
    "bidirectional": _OFF,
    "sliding_window": (None,),
    "use_sliding_window": _OFF,
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "add_cross_attention": _OFF,
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": _OFF,
    "tie_encoder_decoder": _OFF,
    # positions
    "alibi": _OFF,
    "mrope_section": (None,),
    "no_rope_layer_interval": _NONE_OF_THEM,
    "no_rope_layers": (None, []),
    "rope_interleaved": _OFF,
    "use_mrope": _OFF,
    # parameters that these models do not have, or have in parts
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": _OFF,
    "lm_head_bias": _OFF,
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "qk_layernorm": _OFF,
    "qk_norm": _OFF,
    "use_qk_norm": _OFF,
    "moe_intermediate_size": _NONE_OF_THEM,
    "n_routed_experts": _NONE_OF_THEM,
    "num_experts": _NONE_OF_THEM,
    "num_experts_per_tok": _NONE_OF_THEM,
    "num_local_experts": _NONE_OF_THEM,
    "num_nextn_predict_layers": _NONE_OF_THEM,
    # factors and caps, as in Granite, MiniCPM, Cohere and Gemma
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": _ONE,
    "final_logit_softcapping": (None,),
    "logit_scale": _ONE,
    "logits_mup_width_multiplier": _ONE,
    "logits_scaling": _ONE,
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": _ONE,
    "router_jitter_noise": _NONE_OF_THEM,
    "scale_depth": (None,),
    "scale_emb": _ONE,
    "parallel_attn": _OFF,
    "use_parallel_residual": _OFF,
    # weights in another form or another file
    "compression_config": (None,),
    "quantization_config": (None,),
    "transformers_weights": (None,),
    # models of several parts
    "audio_config": (None,),
    "text_config": (None,),
    "vision_config": (None,),
}

# Fields without effect on logits or scores: defaults of training and generation, names, what is returned.
IDLE = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "bias",  # safe-rlhf's head has one if there is a tensor
        "bos_token_id",
        "chunk_size_feed_forward",  # the same numbers with less memory
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "max_window_layers",  # of a sliding window, which is off
        "model_max_length",
        "momentum",  # of safe-rlhf's normaliser in training
        "normalizer_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",  # transformers 5 does not slice
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",  # of transformers' own training; ours is parallel to the objectives
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)

# Off when a model is not trained, and always off here.
DROPOUT = frozenset(
    {
        "attention_dropout",
        "classifier_dropout",
        "embd_pdrop",
        "hidden_dropout",
        "hidden_dropout_prob",
        "layerdrop",
        "resid_pdrop",
        "residual_dropout",
    }
)

_HARMLESS_CODE = {"AutoTokenizer", "AutoProcessor"}


def require(field: str, found: object, *accepted: object) -> None:
    """Raise ``ValueError`` unless a configuration field has one of the accepted values."""
    if found not in accepted:
        raise ValueError(f"config.json {field}: found {found!r}, accepted: {', '.join(map(repr, accepted))}")


def check_fields(config: PreTrainedConfig, reads: Collection[str] = ()) -> None:
    """Refuse what changes the computation and is not read; warn of fields that nobody knows.

    Args:
        config: as transformers reads it, whatever its notation.
        reads: fields that the model's family reads or refuses itself.

    Raises:
        ValueError: a field of ``NEUTRAL`` with another value, a class or code that is not the family's.
    """
    fields: dict[str, Any] = config.to_dict()
    for field, accepted in NEUTRAL.items():
        if field in fields and field not in reads:
            require(field, fields[field], *accepted)
    _check_architecture(config)
    _check_code(fields.get("auto_map"))
    for field in sorted(DROPOUT & fields.keys()):
        if fields[field]:
            _warn(f"config.json {field}: found {fields[field]!r}; no dropout here, not in training either")
    for field in sorted(fields.keys() - READ - NEUTRAL.keys() - IDLE - DROPOUT - set(reads)):
        _warn(
            f"config.json {field}: found {fields[field]!r}, which neither this package nor transformers' "
            f"{config.model_type} knows; it has no effect"
        )


def _check_architecture(config: PreTrainedConfig) -> None:
    """Refuse a class of another computation, such as one that attends in both directions."""
    accepted = [
        names[config.model_type]
        for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
        if config.model_type in names
    ]
    known = {name.lower() for name in accepted}  # the first Llama was LLaMAForCausalLM
    found: object = config.architectures
    if found in (None, []) or not accepted:  # a family of the user's own may have no class in transformers
        return
    name = found[0] if isinstance(found, list) and len(found) == 1 else None
    if not isinstance(name, str) or not (name.lower() in known or name.endswith(SAFE_RLHF)):
        raise ValueError(
            f"config.json architectures: found {found!r}, accepted: one of {', '.join(accepted)}, or a score "
            f"model of safe-rlhf (...{SAFE_RLHF[0]})"
        )


def _check_code(auto_map: object) -> None:
    """Refuse a model that comes with its own code: nothing tells what it computes, and it is never run."""
    if auto_map is None:
        return
    if not isinstance(auto_map, dict) or not _HARMLESS_CODE.issuperset(auto_map):
        raise ValueError(
            f"config.json auto_map: found {auto_map!r}, accepted: no code of the model's own, which is never "
            "run (remove the entry if transformers' own class computes the same)"
        )


@cache
def _warn(text: str) -> None:
    """Say it once in a process, however often a configuration is read."""
    logger.warning("%s", text)
