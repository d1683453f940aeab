"""The configuration of a run: frozen, validated, every field documented where it is declared.

This file has field types, ranges and the checks that need no model. The checks of a gradient strategy are in
the file of ``strategies/`` that declares it, and those that need the model's shape (does tensor parallelism
divide the heads?) in ``planning/layout.py``. ``loading.py`` reads YAML and dotted overrides.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gapo_mega.config.checks import (
    KL_ROW,
    check_average,
    check_correction,
    check_instances,
    check_kl_row,
    check_kl_target,
    check_packing,
)
from gapo_mega.config.fields import Code, LocalPath, Positive, Section
from gapo_mega.config.gradients import GradientConfig
from gapo_mega.config.loggers import Loggers
from gapo_mega.config.lora import LoraConfig, check_lora
from gapo_mega.config.objective import Objectives
from gapo_mega.config.optimizer import CriticConfig, OptimizerConfig
from gapo_mega.config.parallel import ParallelConfig as ParallelConfig
from gapo_mega.config.results import EvaluationConfig, TrainCheckpointConfig, check_evaluations
from gapo_mega.config.scalarization import ScalarizationConfig, check_scalarization
from gapo_mega.config.vllm import VllmConfig


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


class PolicyConfig(ModelConfig):
    """The policy; the reference is its frozen copy, or itself without adapters."""

    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters, and freeze all weights; none: train all weights"
    )
    logits_chunk: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="response tokens whose logits are in memory at once: the output layer runs chunk by "
        "chunk, and once more in every backward; auto: 1024 where that saves memory; 0: all at once",
    )
    router_aux_loss: float = Field(
        0.0,
        ge=0,
        description="factor of a loss that spreads tokens evenly over experts, summed over layers; its "
        "gradient is added once to the combined direction and is no objective's",
    )
    router_z_loss: float = Field(
        0.0,
        ge=0,
        description="factor of a loss that keeps the logits of experts' routers small, added likewise",
    )

    @property
    def router_losses(self) -> bool:
        """Whether routers have losses, for which an update takes passes of its own."""
        return self.router_aux_loss > 0 or self.router_z_loss > 0


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
    heldout_prompts: int = Field(64, ge=0, description="prompts scored before, while and after training")
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
    backend: Code = Field(
        "megatron",
        description="where the responses of a training come from, an entry of gapo_mega.rollout.backends or "
        "a class of one's own. megatron: the trained weights themselves, in the same processes; vllm: vLLM, "
        "in processes of its own",
    )
    ahead: int = Field(
        0,
        ge=0,
        description="steps whose responses are drawn together while as many steps before them are trained, "
        "by a back end with processes of its own; 0: a step waits for its responses, of the policy as it is",
    )
    vllm: VllmConfig = VllmConfig()

    @model_validator(mode="after")
    def _is_random(self) -> RolloutConfig:
        why = "(a greedy response has one outcome, whose probability no gradient changes)"
        if self.temperature == 0:
            raise ValueError(f"rollout.temperature: found {self.temperature}, accepted: above 0 {why}")
        if self.top_k == 1:
            raise ValueError(f"rollout.top_k: found 1, accepted: 0 (all tokens), or at least 2 {why}")
        return self


class AggregationConfig(Section):
    """The method that turns the Gram matrix into weights; ``options`` are its own."""

    name: Code = Field("gapo", description="a method of gapo_mega.aggregation, or a class of one's own")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the method")
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="weights from running means of the gradients, M = average M + (1 - average) g with bias "
        "correction, for the current gradients; one more row a gradient; 0: from the current gradients",
    )
    average_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the running means; bf16 halves them, and rounds by up to 2^-9 every update",
    )


class AdvantageConfig(Section):
    """How token rewards become advantages, an entry of gapo_mega.advantages; ``options`` are its own."""

    name: Code = Field("group", description="an estimator of gapo_mega.advantages, or a class of one's own")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the estimator")
    whiten: bool = Field(
        False, description="unit variance per objective over the step's tokens; rescales ||g_i||"
    )
    filter_flat: bool = Field(
        False,
        description="leave prompts whose samples have equal scores in every objective out of the updates; "
        "for estimators that compare the samples of a prompt (group, grpo, rloo)",
    )


class LossConfig(Section):
    """The policy's loss, an entry of gapo_mega.losses; ``options`` are its own."""

    name: Code = Field("ppo", description="a loss of gapo_mega.losses, or a class of one's own")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the loss")


class AlgorithmConfig(Section):
    """What happens around the loss and the aggregation."""

    kl: Literal["reward", "loss", "objective", "apart"] = Field(
        "reward",
        description="where the divergence from the reference counts. reward: in the reward of every token; "
        "loss: in every objective's loss; objective: as one more row named kl, which the aggregation weighs "
        "as any objective; apart: as one more row that the aggregation does not see, with kl_beta times the "
        "sum of the weights",
    )
    kl_beta: float = Field(
        0.05, ge=0, description="coefficient of the KL, one for all objectives; not used with kl objective"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="of a token's KL in a loss (kl other than reward): with k2 the gradient is that of "
        "KL(pi || ref), with k3 that of KL(ref || pi), with k1 0 in the mean",
    )
    kl_target: float | None = Field(
        None, gt=0, description="KL of a response in nats to which kl_beta is steered; none: it stays"
    )
    kl_horizon: int = Field(
        10_000, ge=1, description="responses within which kl_target changes kl_beta by a fifth at most"
    )
    entropy_beta: float = Field(
        0.0,
        ge=0,
        description="coefficient of the entropy bonus: every objective's loss has -entropy_beta times the "
        "mean entropy of the sampled distribution added, with its exact gradient",
    )
    value_clip: float = Field(5.0, gt=0, description="how far a clipped value may move in one step")
    ppo_epochs: int = Field(1, ge=1, description="passes over the sequences of a step")
    minibatches: int = Field(1, ge=1, description="optimizer steps per PPO epoch")
    old_logprobs: Literal["recompute", "generator"] = Field(
        "recompute",
        description="recompute: by the training forward; generator: those of the rollout, one forward less "
        "(equal to ~1e-5 in fp32; in bf16 the ratio of the first update is not exactly 1)",
    )
    correction: Literal["auto", "none", "tis", "mask", "sequence"] = Field(
        "auto",
        description="weights for responses that came from another distribution than the trainer's; a factor "
        "of every objective's advantages. tis: the token's ratio, cut at correction_cap; mask: the ratio "
        "within correction_range, else 0; sequence: so for the ratio of the whole response; auto: none with "
        "rollout.backend megatron, else tis",
    )
    correction_cap: float = Field(2.0, gt=0, description="largest weight of a token with correction tis")
    correction_range: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        [0.5, 5.0], description="least and greatest ratio that correction mask and sequence keep"
    )


class LoggingConfig(Section):
    """Where the numbers of a step go, besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard events")
    wandb: bool = Field(False, description="needs the wandb extra")
    wandb_project: str = Field("gapo_mega", description="project that wandb logs to")
    loggers: Loggers = Field([], description="further places that show the run, or these two with options")
    progress: bool = Field(True, description="show a progress bar")
    entropy: bool = Field(
        False,
        description="also log the mean entropy of the sampled distribution: one more pass over the logits of "
        "an update, whose all-reduce has one number a token",
    )


class TrainLoggingConfig(LoggingConfig):
    """Where the numbers and the responses of a step go, besides metrics.jsonl."""

    responses: int = Field(
        0,
        ge=0,
        description="rollout steps between those whose sampled responses are kept, a file a step in "
        "responses/; 0: none",
    )


class Config(Section):
    """Everything that defines a run."""

    output_dir: LocalPath = Field(description="directory of the run; the same one resumes it")
    seed: int = Field(1, description="of prompts, sampling and minibatches")
    steps: int = Field(100, ge=1, description="rollout steps")
    micro_batch_size: int = Field(8, ge=1, description="sequences per forward pass on a data-parallel rank")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="in place of micro_batch_size: forward passes of policy, reference and critic get as "
        "many sequences as so many tokens hold, in one row without padding and without attention between "
        "them; at least as many as the longest sequence has",
    )
    model: PolicyConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    objectives: Objectives = Field(description="the rewards")
    aggregation: AggregationConfig = AggregationConfig()
    scalarization: ScalarizationConfig | None = Field(
        None,
        description="none: a gradient for every objective, combined by aggregation; with options.safe: a "
        "gradient for every objective, combined by the scalarizer's weights",
    )
    advantages: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    gradients: GradientConfig = GradientConfig()
    checkpoint: TrainCheckpointConfig = TrainCheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: TrainLoggingConfig = TrainLoggingConfig()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prompt and response."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @property
    def most_sequences(self) -> int:
        """Sequences of a forward pass, if all are of the longest."""
        if self.micro_batch_tokens is None:
            return self.micro_batch_size
        return max(1, self.micro_batch_tokens // self.longest)

    @property
    def one_signal(self) -> ScalarizationConfig | None:
        """The scalarizer that leaves one gradient; None where every objective has its own."""
        return None if self.scalarization is None or self.scalarization.safe else self.scalarization

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the gradients that an update measures and combines: the rows of its Gram matrix."""
        if self.one_signal is not None:
            return (self.one_signal.row,)
        return self.aggregated + ((KL_ROW,) if self.algorithm.kl == "apart" else ())

    @property
    def aggregated(self) -> tuple[str, ...]:
        """Names of the rows that the aggregation sees; the others follow them."""
        names = tuple(objective.name for objective in self.objectives)
        return names + ((KL_ROW,) if self.algorithm.kl == "objective" else ())

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the data that objectives read beside the prompt, and what errors call each setting."""
        return {
            column: f"objective {objective.name!r}: columns"
            for objective in reversed(self.objectives)  # the first that asks for a column names it
            for column in objective.columns
        }

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
    def _sections_fit_together(self) -> Config:
        algorithm = self.algorithm
        names = [objective.name for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"objectives: names must differ, found {names}")
        check_packing(self.micro_batch_tokens, self.longest)
        optimizers = {"optimizer": self.optimizer, "critic.optimizer": self.critic.optimizer}
        check_instances(self.parallel.distributed_optimizer_instances, optimizers)
        check_average(self.aggregation.average, self.gradients)
        check_kl_row(algorithm.kl, names)
        check_kl_target(algorithm.kl_target, algorithm.kl, algorithm.kl_beta)
        model, export = self.model, self.checkpoint.export_adapter
        check_lora(model.lora, model.offload_reference, self.gradients.scope, export)
        check_correction(algorithm.correction, algorithm.correction_range, algorithm.old_logprobs)
        check_evaluations(self.evaluation, self.checkpoint.best, names, self.data.heldout_prompts)
        given, scalarization = self.aggregation, self.scalarization
        fits = given == AggregationConfig()
        if scalarization is not None and scalarization.safe:
            fits = (given.name, given.options) == (AggregationConfig().name, {})
        beside = None if fits else given.name
        check_scalarization(scalarization, beside, names, self.gradients.audit_every, algorithm.kl)
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
