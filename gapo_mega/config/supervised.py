"""The configuration of runs without rollouts: reward models, supervised fine-tuning, preference pairs.

``config.loading.load(path, overrides, kind=RewardModelConfig)`` reads it. The sections that a GAPO run has
too are those of ``gapo_mega.config``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gapo_mega.config import (
    AggregationConfig,
    CheckpointConfig,
    GradientConfig,
    LocalPath,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Section,
    TemplatePath,
)
from gapo_mega.config.checks import check_instances
from gapo_mega.config.fields import MOST_ROWS, Name
from gapo_mega.config.lora import LoraConfig, check_adapter_export
from gapo_mega.option_checks import divisors


class SupervisedData(Section):
    """Where rows come from, and which of them are held out.

    ``source`` is a hub name or a local directory of a data set, a .jsonl[.gz]/.json[.gz]/.parquet file, or
    ``package:NAME``. No prompt is on both sides: rows whose conversations begin alike (all messages up to
    the first of the assistant) go to the same side.
    """

    source: LocalPath = Field(description="where rows come from")
    split: str = Field("train", description="part of the data set that is trained on")
    subset: str | None = Field(
        None, description="configuration of the data set (name, in datasets), or a folder of a local one"
    )
    heldout_source: LocalPath | None = Field(
        None, description="where held-out rows come from; none: cut from source"
    )
    heldout_split: str = Field("test", description="of heldout_source")
    heldout_subset: str | None = Field(None, description="of heldout_source; none: the only one that it has")
    heldout_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the distinct prompts held out where heldout_source is none"
    )


class PreferenceData(SupervisedData):
    """Pairs of responses to one prompt, of which one is preferred."""

    format: Literal["auto", "columns", "hh", "pku"] = Field(
        "auto",
        description="hh: chosen and rejected are transcripts of Human and Assistant (HH-RLHF); pku: prompt, "
        "response_0, response_1 and the number of the better one (PKU-SafeRLHF); columns: chosen and "
        "rejected are texts beside a prompt, or lists of {role, content} messages; auto: by the first row",
    )
    objective: Literal["helpful", "harmless"] | None = Field(
        None,
        description="pku only, and needed there: helpful reads better_response_id, harmless "
        "safer_response_id",
    )
    prompt_column: str = Field(
        "prompt",
        description="columns only: a text or a list of messages; not read where chosen and rejected are "
        "lists that begin with the prompt",
    )
    chosen_column: str = Field("chosen", description="columns and hh")
    rejected_column: str = Field("rejected", description="columns and hh")

    @model_validator(mode="after")
    def _objective_is_for_pku(self) -> PreferenceData:
        if self.format == "pku" and self.objective is None:
            raise ValueError("data.objective: found nothing with format pku, accepted: helpful, harmless")
        if self.format in ("columns", "hh") and self.objective is not None:
            raise ValueError(
                f"data.objective: found {self.objective} with format {self.format}, accepted: null (only pku "
                "rows judge several objectives)"
            )
        return self


class ObjectivePairs(PreferenceData):
    """The pairs of one objective, and what other objectives say of them."""

    margins: dict[str, float] = Field(
        default_factory=dict,
        description="columns that hold another reward of the chosen response less that of the rejected one, "
        "and the weight of each (MODPO); none: DPO",
    )


class ChatData(SupervisedData):
    """Conversations whose assistant the model imitates."""

    format: Literal["auto", "messages", "columns", "hh"] = Field(
        "auto",
        description="messages: a list of {role, content} messages; columns: a prompt and a response; hh: a "
        "transcript of Human and Assistant, such as the chosen one of a preference file; auto: by the "
        "columns that there are, in this order",
    )
    messages_column: str = Field("messages", description="messages only")
    prompt_column: str = Field("prompt", description="columns only: a text or a list of messages")
    response_column: str = Field("response", description="columns only")
    transcript_column: str = Field("chosen", description="hh only")


class ScoreModelConfig(ModelConfig):
    """The model to train, and how it reads a conversation."""

    max_tokens: int = Field(
        512, ge=2, description="longer conversations are left out, and counted in the log"
    )
    chat_template: TemplatePath | None = Field(
        None, description="Jinja text, or a file ending in .jinja; none: the tokenizer's own"
    )
    keep_layers: int | None = Field(
        None, ge=1, description="use only the first N decoder layers of path; none: all"
    )
    lora: LoraConfig | None = Field(
        None,
        description="train low-rank adapters (and the score head), and freeze all other weights; none: train "
        "all weights",
    )


class ChatModelConfig(ScoreModelConfig):
    """The language model to train."""

    logits_chunk: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="tokens to learn whose logits are in memory at once: the output layer runs chunk by "
        "chunk, and once more in the backward; auto: 1024 where that saves memory (train-pairs: all at "
        "once); 0: all at once",
    )


class SupervisedOptimizer(OptimizerConfig):
    """Megatron's optimizer, with a learning rate of the size that supervised training takes."""

    lr: float = Field(1e-5, gt=0, description="largest learning rate, reached after the warm-up")


class DataEvaluationConfig(Section):
    """Measures on the held-out rows; the end of a run always has them."""

    every_steps: int = Field(
        0, ge=0, description="optimizer steps between held-out evaluations; 0: only at the end"
    )


class SkipConfig(Section):
    """What becomes of gradients that are not finite."""

    max_nonfinite_steps: int = Field(3, ge=1, description="stop after this many skipped steps in a row")


class SupervisedConfig(Section):
    """What supervised runs have in common."""

    output_dir: LocalPath = Field(description="directory of the run; the same one resumes it")
    seed: int = Field(1, description="of the order of rows, and of a new score head")
    epochs: int = Field(1, ge=1, description="passes over the data, each without its incomplete last batch")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps; none: never")
    batch_size: int = Field(
        64, ge=1, description="pairs or chats of one optimizer step over all data-parallel ranks"
    )
    micro_batch_size: int = Field(
        8, ge=1, description="pairs or chats per forward pass on a data-parallel rank"
    )
    model: ScoreModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: SupervisedOptimizer = SupervisedOptimizer()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: DataEvaluationConfig = DataEvaluationConfig()
    gradients: SkipConfig | GradientConfig = SkipConfig()  # each kind of run has one of them

    @model_validator(mode="after")
    def _instances_are_of_distributed_optimizers(self) -> SupervisedConfig:
        instances = self.parallel.distributed_optimizer_instances
        check_instances(instances, {"optimizer": self.optimizer})
        return self

    @model_validator(mode="after")
    def _exports_an_adapter_that_there_is(self) -> SupervisedConfig:
        check_adapter_export(self.model.lora, self.checkpoint.export_adapter, self.model.keep_layers)
        return self

    @property
    def data_sets(self) -> int:
        """Data sets of which a step takes ``batch_size`` items each."""
        return 1


class RewardModelConfig(SupervisedConfig):
    """A reward model: one score per conversation, by the Bradley-Terry loss on preference pairs.

    The loss of a pair is ``-log sigmoid(chosen - rejected) + center_rewards * ((chosen + rejected) / 2)^2``.
    """

    data: PreferenceData
    gradients: SkipConfig = SkipConfig()
    center_rewards: float = Field(
        0.0,
        ge=0,
        description="coefficient of the squared mean of a pair's two scores, which the data leave open; "
        "0: off",
    )


class SftConfig(SupervisedConfig):
    """Supervised fine-tuning: the next token of conversations, by cross entropy."""

    model: ChatModelConfig
    data: ChatData
    gradients: SkipConfig = SkipConfig()
    assistant_only: bool = Field(True, description="loss on the assistant's tokens only; false: on all")


class PairObjective(Section):
    """One objective: its own pairs."""

    name: Name = Field(description="what the log calls it")
    data: ObjectivePairs
    weight: float = Field(
        1.0, gt=0, description="divides z (see loss): the objective's own weight in MODPO, 1 in DPO"
    )


class PairLossConfig(Section):
    """The loss of a pair, from the policy's and the reference's log-probabilities of both responses.

    With ``d`` the log-ratio of policy and reference for the chosen response less that for the rejected one,
    ``z = (beta d - sum_j margins_j column_j) / weight``:

    - ``dpo``: ``-(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z)``
    - ``ipo``: ``(d - 1 / (2 beta))^2``
    """

    name: Literal["dpo", "ipo"] = Field("dpo", description="the formula")
    beta: float = Field(0.1, gt=0, description="how strongly the reference holds the policy")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo only: assumed share of pairs with the wrong response preferred"
    )
    length_normalized: bool = Field(
        False, description="log-ratios per token of the response instead of summed over it"
    )

    @model_validator(mode="after")
    def _smoothing_is_for_dpo(self) -> PairLossConfig:
        if self.name == "ipo" and self.label_smoothing:
            raise ValueError(
                f"loss.label_smoothing: found {self.label_smoothing} with name ipo, accepted: 0 (it is dpo's)"
            )
        return self


class PairOptimizer(SupervisedOptimizer):
    """Megatron's optimizer, with a learning rate of the size that preference pairs take."""

    lr: float = Field(1e-6, gt=0, description="largest learning rate, reached after the warm-up")


class PairsConfig(SupervisedConfig):
    """A policy trained on preference pairs of several objectives, each with its own data.

    A step takes ``batch_size`` pairs of every objective. An epoch is one pass over the longest data set; the
    others begin again meanwhile.
    """

    model: ChatModelConfig
    objectives: list[PairObjective] = Field(min_length=1, max_length=MOST_ROWS, description="the data sets")
    loss: PairLossConfig = PairLossConfig()
    aggregation: AggregationConfig = AggregationConfig()
    gradients: GradientConfig = GradientConfig()
    optimizer: PairOptimizer = PairOptimizer()

    @property
    def data_sets(self) -> int:
        return len(self.objectives)

    @model_validator(mode="after")
    def _fits_together(self) -> PairsConfig:
        names = [objective.name for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"objectives: names must differ, found {names}")
        if self.model.keep_layers is not None:
            raise ValueError(
                f"model.keep_layers: found {self.model.keep_layers}, accepted: null (the reference is the "
                "policy as it was)"
            )
        for index, objective in enumerate(self.objectives):
            if self.loss.name == "ipo" and (objective.data.margins or objective.weight != 1):
                raise ValueError(
                    f"objectives.{index}: found data.margins or a weight with loss.name ipo, accepted: dpo"
                )
        return self


def check_batches(config: SupervisedConfig, data_ranks: int) -> None:
    """Raise ``ValueError`` unless a step splits into whole microbatches on each of ``data_ranks`` ranks."""
    size, micro = config.batch_size, config.micro_batch_size
    if size % data_ranks:
        raise ValueError(
            f"batch_size: found {size}, accepted for {data_ranks} data-parallel ranks: a multiple of "
            f"{data_ranks}"
        )
    share = size // data_ranks
    if share % micro:
        # Pipeline stages exchange tensors of one size, so all microbatches are alike.
        fitting = map(str, divisors(share))
        raise ValueError(
            f"micro_batch_size: found {micro}, accepted for a batch_size of {share} on a data-parallel rank: "
            f"{', '.join(fitting)}"
        )
