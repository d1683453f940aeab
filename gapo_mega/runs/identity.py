"""What a checkpoint belongs to: every field of the configuration, and whether a resumed run may change it.

``RULES`` has one line for every field of every section. Settings that are ``FIXED`` define what is trained;
those of ``FREE`` say how, where or for how long. Others name data, models or code by a place: what lies there
counts (``fingerprints.py``), and the place may change. ``options`` compare as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, get_args

from gapo_mega.config import (
    AdvantageConfig,
    AggregationConfig,
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    EvaluationConfig,
    GradientConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    RolloutConfig,
    ScalarizationConfig,
    Section,
    TrainCheckpointConfig,
    TrainLoggingConfig,
    VllmConfig,
)
from gapo_mega.config.loggers import LoggerConfig
from gapo_mega.config.lora import LoraConfig
from gapo_mega.config.supervised import (
    ChatData,
    ChatModelConfig,
    DataEvaluationConfig,
    ObjectivePairs,
    PairLossConfig,
    PairObjective,
    PreferenceData,
    RewardModelConfig,
    ScoreModelConfig,
    SftConfig,
    SkipConfig,
    SupervisedConfig,
    SupervisedData,
)
from gapo_mega.files import local
from gapo_mega.user_code import is_reference, is_subclass


class Rule(Enum):
    """What resuming with another value of a field does."""

    FIXED = "refused"
    FREE = "taken, and logged"
    CODE = "refused where name and text of the file are others; another text of the same file is logged"
    ROWS = "taken where the rows are the same"
    MODEL = "taken where the policy's weights are the same"
    CRITIC = "taken where the critic's weights are the same"
    TEMPLATE = "taken where the text of the template is the same"


FIXED, FREE, CODE, ROWS = Rule.FIXED, Rule.FREE, Rule.CODE, Rule.ROWS

# By the class that declares the fields; a field that is a section itself is looked up under its own class.
RULES: dict[type[Section], dict[str, Rule]] = {
    Config: {
        "output_dir": FREE,
        "seed": FIXED,
        "steps": FREE,
        "micro_batch_size": FREE,
        "micro_batch_tokens": FREE,
    },
    ModelConfig: {
        "path": Rule.MODEL,
        "dtype": FIXED,
        "recompute": FREE,
        "offload_reference": FREE,
    },
    PolicyConfig: {"logits_chunk": FREE, "router_aux_loss": FIXED, "router_z_loss": FIXED},
    LoraConfig: {
        "rank": FIXED,
        "alpha": FIXED,
        "rank_stabilized": FIXED,
        "target_modules": FIXED,
        "path": FIXED,
    },
    ParallelConfig: {
        "tensor": FREE,
        "pipeline": FREE,
        "sequence_parallel": FREE,
        "virtual_pipeline": FREE,
        "context": FREE,
        "expert": FREE,
        "expert_tensor": FREE,
        "distributed_optimizer_instances": FREE,
        "timeout_minutes": FREE,
        "silence_minutes": FREE,
        "phase_minutes": FREE,
    },
    DataConfig: {
        "source": ROWS,
        "split": ROWS,
        "subset": ROWS,
        "prompt_column": ROWS,
        "heldout_source": ROWS,
        "heldout_split": ROWS,
        "heldout_subset": ROWS,
        "heldout_prompts": FIXED,
        "system_prompt": FIXED,
        "chat_template": FIXED,
        "max_prompt_tokens": FIXED,
        "shuffle": FIXED,
    },
    RolloutConfig: {
        "prompts_per_step": FIXED,
        "samples_per_prompt": FIXED,
        "max_new_tokens": FIXED,
        "temperature": FIXED,
        "top_k": FIXED,
        "top_p": FIXED,
        "repetition_penalty": FIXED,
        "batch_size": FREE,
        "backend": CODE,
        "ahead": FREE,
    },
    VllmConfig: {
        "python": FREE,
        "url": FREE,
        "arguments": FREE,
        "replicas": FREE,
        "environment": FREE,
        "transfer": FREE,
        "weights_directory": FREE,
        "piece_mib": FREE,
        "sleep": FREE,
        "timeout": FREE,
        "patience": FREE,
        "start_timeout": FREE,
    },
    ObjectiveConfig: {
        "name": FIXED,
        "kind": CODE,
        "function": CODE,
        "options": FIXED,
        "columns": FIXED,
        "per_sample": FIXED,
        "outputs": FIXED,
        "output": FIXED,
        "clip": FIXED,
    },
    AggregationConfig: {"name": CODE, "options": FIXED, "average": FIXED, "average_dtype": FIXED},
    ScalarizationConfig: {"name": CODE, "options": FIXED},
    AdvantageConfig: {"name": CODE, "options": FIXED, "whiten": FIXED, "filter_flat": FIXED},
    LossConfig: {"name": CODE, "options": FIXED},
    LoggerConfig: {"name": FREE, "options": FREE},
    AlgorithmConfig: {
        "kl": FIXED,
        "kl_beta": FIXED,
        "entropy_beta": FIXED,
        "kl_estimator": FIXED,
        "kl_target": FIXED,
        "kl_horizon": FIXED,
        "value_clip": FIXED,
        "ppo_epochs": FIXED,
        "minibatches": FIXED,
        "old_logprobs": FIXED,
        "correction": FIXED,
        "correction_cap": FIXED,
        "correction_range": FIXED,
    },
    OptimizerConfig: {
        "name": FIXED,
        "lr": FREE,
        "min_lr": FREE,
        "schedule": FIXED,
        "warmup_fraction": FIXED,
        "weight_decay": FIXED,
        "beta1": FIXED,
        "beta2": FIXED,
        "eps": FIXED,
        "momentum": FIXED,
        "clip_grad": FIXED,
        "distributed": FREE,
        "overlap_grad_reduce": FREE,
        "overlap_param_gather": FREE,
    },
    CriticConfig: {"path": Rule.CRITIC, "heads": FIXED},
    GradientConfig: {
        "store": FREE,
        "store_dtype": FIXED,
        "forward": FREE,
        "scope": FIXED,
        "metric": FIXED,
        "actual_change": FREE,
        "max_nonfinite_steps": FREE,
        "audit_every": FREE,
    },
    CheckpointConfig: {
        "every_steps": FREE,
        "keep": FREE,
        "keep_gb": FREE,
        "asynchronous": FREE,
        "resume": FREE,
        "save_final": FREE,
        "export_hf": FREE,
        "export_adapter": FREE,
        "export_to": FREE,
    },
    TrainCheckpointConfig: {"best": FREE},
    EvaluationConfig: {
        "samples_per_prompt": FIXED,
        "every_steps": FREE,
        "early_stopping_patience": FREE,
        "shown": FREE,
        "shared": FREE,
    },
    TrainLoggingConfig: {"responses": FREE},
    LoggingConfig: {
        "tensorboard": FREE,
        "wandb": FREE,
        "wandb_project": FREE,
        "progress": FREE,
        "entropy": FREE,
    },
    SupervisedConfig: {
        "output_dir": FREE,
        "seed": FIXED,
        "epochs": FREE,
        "max_steps": FREE,
        "batch_size": FIXED,
        "micro_batch_size": FREE,
    },
    DataEvaluationConfig: {"every_steps": FREE},
    SkipConfig: {"max_nonfinite_steps": FREE},
    RewardModelConfig: {"center_rewards": FIXED},
    SftConfig: {"assistant_only": FIXED},
    ScoreModelConfig: {
        "max_tokens": FIXED,
        "chat_template": Rule.TEMPLATE,
        "keep_layers": FIXED,
    },
    ChatModelConfig: {"logits_chunk": FREE},
    SupervisedData: {
        "source": ROWS,
        "split": ROWS,
        "subset": ROWS,
        "heldout_source": ROWS,
        "heldout_split": ROWS,
        "heldout_subset": ROWS,
        "heldout_fraction": ROWS,
    },
    PreferenceData: {
        "format": ROWS,
        "objective": ROWS,
        "prompt_column": ROWS,
        "chosen_column": ROWS,
        "rejected_column": ROWS,
    },
    ObjectivePairs: {"margins": ROWS},
    PairObjective: {"name": FIXED, "weight": FIXED},
    PairLossConfig: {
        "name": FIXED,
        "beta": FIXED,
        "label_smoothing": FIXED,
        "length_normalized": FIXED,
    },
    ChatData: {
        "format": ROWS,
        "messages_column": ROWS,
        "prompt_column": ROWS,
        "response_column": ROWS,
        "transcript_column": ROWS,
    },
}

# Not a field, and logged like one: the optimizer steps that the schedule of the learning rate takes.
TOTAL_UPDATES = "total_updates"


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run is, as its checkpoints hold it. Everything is JSON."""

    command: str
    settings: dict[str, Any]  # by dotted name
    contents: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # fingerprints of data and models, by what they are of

    def as_dict(self) -> dict[str, Any]:
        """For ``complete.json``."""
        return dataclasses.asdict(self)


def rule_of(section: type[Section], name: str) -> Rule:
    """The rule of a field. Raises ``KeyError`` for one that has none."""
    for declaring in section.__mro__:
        rules = RULES.get(declaring)
        if rules is not None and name in rules:
            return rules[name]
    raise KeyError(f"{section.__name__}.{name} is in no line of RULES")


def fields_of(section: Section, prefix: str = "") -> Iterator[tuple[str, Rule, Any]]:
    """Dotted name, rule and value of every field of ``section`` and of those within it.

    Fields of a section that may be left out, and is, have the value None.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        key = prefix + name
        if isinstance(value, Section):
            yield from fields_of(value, f"{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                yield from fields_of(item, f"{key}.{index}.")
        elif absent := _section_in(field.annotation):
            yield from ((f"{key}.{inner}", rule_of(absent, inner), None) for inner in absent.model_fields)
        else:
            yield key, rule_of(type(section), name), value


def _section_in(annotation: Any) -> type[Section] | None:
    """The section of an annotation ``Section | None``."""
    return next((part for part in get_args(annotation) if is_subclass(part, Section)), None)


def rules_of(config: Section) -> dict[str, Rule]:
    """The rule of every field of ``config``, by dotted name."""
    return {key: rule for key, rule, _ in fields_of(config)}


def settings_of(config: Section, without: str | None = None) -> dict[str, Any]:
    """Every field's value as JSON has it. Code of the user's is file, name and digest of the file's text.

    ``without``: a section that the run does not use, whose values therefore do not matter.
    """
    found = {
        key: _code(value) if rule is CODE and isinstance(value, str) else value
        for key, rule, value in fields_of(config)
        if without is None or not key.startswith(f"{without}.")
    }
    # As a checkpoint will give it back: options may hold what YAML has and JSON has not, such as dates.
    values: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return values


def objective_names(settings: Mapping[str, Any]) -> list[str]:
    """The names of the objectives in ``settings``, in order; none in supervised runs."""
    return [
        value for key, value in settings.items() if key.startswith("objectives.") and key.endswith(".name")
    ]


def _code(reference: str) -> str | dict[str, str]:
    place, _, name = reference.rpartition(":")
    if not (is_reference(reference) and place.endswith(".py")):
        return reference
    path = local(place)
    text = path.read_bytes() if os.path.isfile(path) else b""
    return {"file": str(path), "name": name, "sha256": hashlib.sha256(text).hexdigest()[:16]}
