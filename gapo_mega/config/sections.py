"""The configuration of a run: frozen, validated, every field documented where it is declared.

This file has field types, ranges and the checks that need no model. The checks of a gradient strategy are in
the file of ``strategies/`` that declares it, and those that need the model's shape (does tensor parallelism
divide the heads?) in ``planning/layout.py``. ``loading.py`` reads YAML and dotted overrides.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticKnownError

from gapo_mega.config import strategies
from gapo_mega.config.fields import Code, LocalPath, Section
from gapo_mega.config.results import CheckpointConfig, EvaluationConfig
from gapo_mega.config.scalarization import ScalarizationConfig, check_one_signal


class ModelConfig(Section):
    """The policy; the reference is its frozen copy."""

    path: LocalPath = Field(
        description="Hugging Face directory or hub name, or a checkpoint of gapo-mega convert or train"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="compute type; bf16 keeps fp32 main parameters"
    )
    recompute: Literal["none", "selective", "full"] = Field("none", description="activation checkpointing")
    offload_reference: bool = Field(
        False, description="keep the frozen reference in host memory between uses (GPU only)"
    )


class ParallelConfig(Section):
    """How the model is spread over ranks; data parallelism takes what is left of the world."""

    tensor: int = Field(1, ge=1, description="ranks that share every layer; divides the attention heads")
    pipeline: int = Field(1, ge=1, description="stages that share the layers; divides their number")
    sequence_parallel: bool = Field(False, description="needs tensor > 1")
    virtual_pipeline: int = Field(
        1,
        ge=1,
        description="parts of every stage's layers, which microbatches pass one after the other (interleaved "
        "schedule: less idling, more messages); needs pipeline > 1",
    )
    context: int = Field(1, ge=1, description="context parallelism; only 1 is accepted")
    expert: int = Field(1, ge=1, description="expert parallelism; only 1 is accepted")
    distributed_optimizer_instances: int = Field(1, ge=1, description="only 1 is accepted")

    @model_validator(mode="after")
    def _refuse_untested(self) -> ParallelConfig:
        for name in ("context", "expert", "distributed_optimizer_instances"):
            value = getattr(self, name)
            if value != 1:
                raise ValueError(
                    f"parallel.{name}: found {value}, accepted: 1 (the gradient inner products have "
                    "not been verified in other layouts)"
                )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel: found true with parallel.tensor 1; it needs tensor >= 2"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline: found {self.virtual_pipeline} with parallel.pipeline 1; it "
                "needs pipeline >= 2"
            )
        return self


class DataConfig(Section):
    """Prompts. A source is a hub name, a directory of a data set, a .jsonl[.gz]/.json[.gz]/.parquet file, or
    ``package:NAME``."""

    source: LocalPath | Annotated[list[LocalPath], Field(min_length=1)] = Field(
        description="where prompts come from; several are read one after another"
    )
    split: str = Field("train", description="part of the data set that is trained on")
    subset: str | None = Field(
        None, description="configuration of the data set (name, in datasets), or a folder of a local one"
    )
    prompt_column: str = Field(
        "prompt",
        description="a string, a list of {role, content} messages, or a transcript of HH-RLHF; where a "
        "conversation ends in an answer, that one is left out and asked for again",
    )
    heldout_source: LocalPath | None = Field(
        None, description="where held-out prompts come from; none: cut from source"
    )
    heldout_split: str = Field("test", description="part of heldout_source")
    heldout_subset: str | None = Field(None, description="of heldout_source; none: the only one that it has")
    heldout_prompts: int = Field(64, ge=0, description="prompts scored before and after training")
    system_prompt: str | None = Field(
        None, description="system message of prompts without one; none: the chat template's own"
    )
    chat_template: bool = Field(
        True,
        description="false: the raw prompt text is the model's input, after what the tokenizer puts before "
        "a text",
    )
    max_prompt_tokens: int = Field(
        256, ge=1, description="longer prompts are left out, and counted in the log"
    )
    shuffle: bool = Field(True, description="draw prompts in a random order that depends on the seed")


class RolloutConfig(Section):
    """Sampling of responses."""

    prompts_per_step: int = Field(8, ge=1, description="prompts of one step over all data-parallel ranks")
    samples_per_prompt: int = Field(4, ge=1, description="responses to every prompt of a step")
    max_new_tokens: int = Field(64, ge=1, description="longest response, in tokens")
    temperature: float = Field(
        1.0,
        ge=0,
        description="divides the logits, here and in every log-probability; above 0: a greedy response has "
        "one outcome and no gradient",
    )
    top_k: int = Field(0, ge=0, description="most likely tokens to sample from; 0 keeps all, 1 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="probability mass to sample from; 1 keeps all")
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description="divides positive logits of tokens that occurred, multiplies negative ones; 1: off",
    )
    batch_size: int = Field(64, ge=1, description="sequences generated at once on a data-parallel rank")

    @model_validator(mode="after")
    def _is_random(self) -> RolloutConfig:
        why = "(a greedy response has one outcome, whose probability no gradient changes)"
        if self.temperature == 0:
            raise ValueError(f"rollout.temperature: found {self.temperature}, accepted: above 0 {why}")
        if self.top_k == 1:
            raise ValueError(f"rollout.top_k: found 1, accepted: 0 (all tokens), or at least 2 {why}")
        return self


class ObjectiveConfig(Section):
    """One reward. Higher is better; flip the sign of costs in the function."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="what the log calls it")
    kind: Code = Field("python", description="an entry of gapo_mega.objectives, or a class of one's own")
    function: Code | None = Field(
        None, description="module:function or path/to/file.py:function over (prompts, responses) -> scores"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the kind")
    clip: float | None = Field(None, gt=0, description="scores are clipped to [-clip, clip]")


class AggregationConfig(Section):
    """The method that turns the Gram matrix into weights; ``options`` are its own."""

    name: Code = Field("gapo", description="a method of gapo_mega.aggregation, or a class of one's own")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the method")


class AdvantageConfig(Section):
    """``gae`` (needs the critic) or ``group`` (critic-free: against the other samples of the prompt)."""

    name: Code = Field("group", description="an estimator of gapo_mega.advantages, or a class of one's own")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the estimator")
    whiten: bool = Field(
        False, description="unit variance per objective over the step's tokens; rescales ||g_i||"
    )


class LossConfig(Section):
    """The policy's loss, an entry of gapo_mega.losses; ``options`` are its own."""

    name: Code = Field("ppo", description="a loss of gapo_mega.losses, or a class of one's own")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the loss")


class AlgorithmConfig(Section):
    """What happens around the loss and the aggregation."""

    kl_beta: float = Field(
        0.05, ge=0, description="coefficient of the KL reward per token, the same for every objective"
    )
    value_clip: float = Field(5.0, gt=0, description="how far a clipped value may move in one step")
    ppo_epochs: int = Field(1, ge=1, description="passes over the sequences of a step")
    minibatches: int = Field(1, ge=1, description="optimizer steps per PPO epoch")
    old_logprobs: Literal["recompute", "generator"] = Field(
        "recompute",
        description="recompute: by the training forward; generator: those of the rollout, one forward less "
        "(equal to ~1e-5 in fp32; in bf16 the ratio of the first update is not exactly 1)",
    )


class OptimizerConfig(Section):
    """Megatron's optimizer for one model."""

    name: Literal["adam", "sgd"] = Field("adam", description="adam is AdamW where weight_decay is not 0")
    lr: float = Field(1e-6, gt=0, description="largest learning rate, reached after the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the schedule")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="decay after the warm-up")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of all steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam only: decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="adam only: decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="adam only: added to the root of the second moment")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only")
    clip_grad: float = Field(1.0, ge=0, description="norm to clip the combined gradient to; 0 turns it off")
    distributed: bool = Field(True, description="Megatron's distributed optimizer; adam only")
    overlap_grad_reduce: bool = Field(False, description="reduce gradients while the backward still runs")

    overlap_param_gather: bool = Field(
        False,
        description="gather stepped parameters while the next forward already runs; needs distributed and "
        "overlap_grad_reduce",
    )

    @model_validator(mode="after")
    def _gathers_what_is_split(self) -> OptimizerConfig:
        if self.overlap_param_gather and not (self.distributed and self.overlap_grad_reduce):
            lacking = "distributed" if not self.distributed else "overlap_grad_reduce"
            raise ValueError(
                f"optimizer.overlap_param_gather: found true with {lacking} false, accepted: false (it needs "
                "optimizer.distributed and optimizer.overlap_grad_reduce)"
            )
        return self

    @model_validator(mode="after")
    def _sgd_is_not_distributed(self) -> OptimizerConfig:
        if self.name == "sgd" and self.distributed:
            raise ValueError(
                "optimizer.distributed: found true with name sgd, accepted: false (Megatron's distributed "
                "optimizer is Adam only)"
            )
        return self


class CriticConfig(Section):
    """Value models, used when the advantage estimator needs them."""

    path: LocalPath | None = Field(
        None, description="Hugging Face directory of the backbone; none: the policy's"
    )
    heads: Literal["shared", "separate"] = Field("shared", description="one model with M heads, or M models")
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-7)


LayerRange = Annotated[list[int], Field(min_length=2, max_length=2)]  # [first, end)


def _declared(value: object) -> object:
    """Validate like a ``Literal`` of the declared strategies' values."""
    accepted = strategies.stores()
    if value not in accepted:
        *others, last = map(repr, accepted)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return value


class GradientConfig(Section):
    """How per-objective gradients are measured, held and checked."""

    store: Annotated[str, BeforeValidator(_declared)] = Field(
        "shards",
        description="shards: one row of this rank's reduced shard per objective, the last in Megatron's own "
        "buffer; single: no row at all, m (m + 1) / 2 + 1 passes (one fewer where the last pair measured is "
        "the direction, as for two objectives with gapo and p = 1)",
    )
    store_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the rows of store shards; bf16 halves them and rounds by up to 2^-9"
    )
    forward: Literal["auto", "one_pass", "shared", "separate"] = Field(
        "auto",
        description="one_pass: one forward and as many backwards as a sequence's cotangents have directions, "
        "one where every advantage is a number for a whole response; m - 1 rows of all parameters of a rank; "
        "shared: one forward per microbatch and a backward per objective through its graph, each "
        "reduced over the data ranks (no pipeline); separate: a forward and a backward per objective, "
        "reduced once a minibatch; auto: one_pass without a critic (with a pipeline: if a rollout has one "
        "update), else shared without a pipeline where it adds no communication (one microbatch, or one data "
        "rank), else separate",
    )
    scope: Literal["full", "last_layer", "last_block"] | list[LayerRange] = Field(
        "full",
        description="parameters that enter the inner products; the update is always of all. last_layer: the "
        "output layer (the paper's choice); last_block: with the last transformer layer; "
        "[[first, end], ...]: these transformer layers, from 0, end excluded",
    )
    metric: Literal["euclidean", "adam"] = Field(
        "euclidean",
        description="adam: inner products weighted by 1 / (sqrt(v) + eps), v Adam's bias-corrected second "
        "moment before the step; euclidean until the first step, and 0 where v still is 0",
    )
    actual_change: bool | None = Field(
        None,
        description="also log the inner product of every gradient with the change that the optimizer made to "
        "the parameters (a copy of this rank's parameters during the step); none: with metric adam only",
    )
    max_nonfinite_steps: int = Field(3, ge=1, description="stop after this many skipped steps in a row")
    audit_every: int = Field(
        0,
        ge=0,
        description="with a scalarizer: every such update also measures the gradient of each objective, "
        "which tells whom the step hurts and changes nothing of it (rows and passes of all objectives and "
        "one more); 0: never",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> GradientConfig:
        strategies.chosen(self).check()
        return self


class LoggingConfig(Section):
    """Where the numbers of a step go, besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard events")
    wandb: bool = Field(False, description="needs the wandb extra")
    wandb_project: str = Field("gapo_mega", description="project that wandb logs to")
    progress: bool = Field(True, description="show a progress bar")


class Config(Section):
    """Everything that defines a run."""

    output_dir: LocalPath = Field(description="directory of the run; the same one resumes it")
    seed: int = Field(1, description="of prompts, sampling and minibatches")
    steps: int = Field(100, ge=1, description="rollout steps")
    micro_batch_size: int = Field(8, ge=1, description="sequences per forward pass on a data-parallel rank")
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    objectives: list[ObjectiveConfig] = Field(min_length=1, max_length=16, description="the rewards")
    aggregation: AggregationConfig = AggregationConfig()
    scalarization: ScalarizationConfig | None = Field(
        None, description="none: a gradient for every objective, combined by aggregation"
    )
    advantages: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    gradients: GradientConfig = GradientConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prompt and response."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the gradients that an update measures and combines: the rows of its Gram matrix."""
        if self.scalarization is not None:
            return (self.scalarization.row,)
        return tuple(objective.name for objective in self.objectives)

    @property
    def audited_rows(self) -> tuple[str, ...]:
        """Rows of an audited update: the objectives, then the scalarizer's. Empty where there is none."""
        if not self.gradients.audit_every:
            return ()
        return (*(objective.name for objective in self.objectives), *self.rows)

    def sequences(self, data_ranks: int = 1) -> int:
        """Responses of one step, on each of ``data_ranks`` ranks."""
        return self.rollout.prompts_per_step // data_ranks * self.rollout.samples_per_prompt

    @model_validator(mode="after")
    def _objective_names_differ(self) -> Config:
        names = [o.name for o in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"objectives: names must differ, found {names}")
        return self

    @model_validator(mode="after")
    def _one_signal(self) -> Config:
        names = [objective.name for objective in self.objectives]
        beside = None if self.aggregation == AggregationConfig() else self.aggregation.name
        check_one_signal(self.scalarization, beside, names, self.gradients.audit_every)
        return self

    @model_validator(mode="after")
    def _gradients_fit(self) -> Config:
        gradients = self.gradients
        if gradients.metric == "adam" and self.optimizer.name != "adam":
            raise ValueError(
                f"gradients.metric: found adam with optimizer.name {self.optimizer.name}, accepted: euclidean"
            )
        if gradients.forward == "shared" and self.parallel.pipeline > 1:
            raise ValueError(
                f"gradients.forward: found shared with parallel.pipeline {self.parallel.pipeline}, accepted: "
                "auto, separate (a pipeline keeps no graph from first to last stage)"
            )
        return self
