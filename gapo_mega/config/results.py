"""What a run leaves behind: the sections of checkpoints and of the answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from gapo_mega.config.fields import LocalPath, Positive, RemotePath, Section

# Of rollout.vllm: where servers are and how long they are waited for. Its arguments change what they answer.
_OF_SERVERS = (
    *("python", "url", "replicas", "environment", "transfer", "weights_directory", "piece_mib"),
    *("sleep", "timeout", "patience", "start_timeout"),
)
# Prefixes of settings that change no number: where and what a run writes, where it asks, how long it waits.
WITHOUT_EFFECT = (
    *("checkpoint.every_steps", "checkpoint.keep", "checkpoint.resume", "checkpoint.save_final"),
    *(
        "checkpoint.asynchronous",
        "checkpoint.export_hf",
        "checkpoint.export_to",
        "checkpoint.export_adapter",
        "logging.",
        "evaluation.shown",
        "evaluation.shared",
    ),
    *("parallel.timeout_minutes", "parallel.silence_minutes", "parallel.phase_minutes"),
    *(f"rollout.vllm.{name}" for name in _OF_SERVERS),
)
EVERY_STEPS = "evaluation.every_steps"
# By what a checkpoint may be the best, beside the name of an objective.
WORST_GAIN, HYPERVOLUME = "worst_gain", "hypervolume"


class CheckpointConfig(Section):
    """Resumable state in Megatron's torch_dist format."""

    every_steps: int = Field(0, ge=0, description="0: only on SIGTERM and at the end")
    keep: int = Field(2, ge=1, description="complete checkpoints kept; not used with keep_gb")
    keep_gb: Positive | None = Field(
        None,
        description="keep as many complete checkpoints as fit into so many GB (1e9 bytes), and always the "
        "newest; none: keep says how many",
    )
    asynchronous: bool = Field(
        False,
        description="write checkpoints while training goes on, from a copy in the host's memory; ways out "
        "wait for the one under way",
    )
    resume: bool = Field(True, description="continue from the newest complete checkpoint of output_dir")
    save_final: bool = Field(False, description="also keep a resumable checkpoint of the last step")
    export_hf: bool = Field(True, description="write the trained policy as a Hugging Face directory")
    export_adapter: bool = Field(
        False, description="also write the trained adapter in PEFT's format, to adapter/; needs model.lora"
    )
    export_to: RemotePath | None = Field(
        None,
        description="where that directory is put at the end, too: PROTOCOL://PLACE for fsspec (s3, gs, abfs, "
        "sftp, file ...); none: nowhere. Needs export_hf",
    )

    @model_validator(mode="after")
    def _exports_what_it_puts(self) -> CheckpointConfig:
        if self.export_to is not None and not self.export_hf:
            raise ValueError(
                "checkpoint.export_to: found with checkpoint.export_hf false, accepted: null, or an export"
            )
        return self


class TrainCheckpointConfig(CheckpointConfig):
    """Resumable state in Megatron's torch_dist format, and which policy counts as the run's result."""

    best: str | None = Field(
        None,
        description="also keep the checkpoint of the best evaluation, and end with it: hf/, held-out numbers "
        "and report are of that step. By the name of an objective, by worst_gain or by hypervolume; none: "
        "the last step is the result. Needs evaluation.every_steps",
    )


class EvaluationConfig(Section):
    """Held-out scores before, while and after training: paired, same prompts, same sampling seed."""

    samples_per_prompt: int = Field(1, ge=1, description="responses to every held-out prompt")
    every_steps: int = Field(
        0,
        ge=0,
        description="rollout steps between evaluations while training, which the log and the report have; "
        "the last step has one, too. 0: only before and after training",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="end the run after so many evaluations in a row without a new best by checkpoint.best; "
        "none: train all steps",
    )
    shown: int = Field(6, ge=0, description="sample responses shown in the report")
    shared: LocalPath | None = Field(
        None,
        description="directory where the answers before training are kept for, and taken from, runs that "
        "begin alike: model, held-out rows, sampling, objectives, seed, layout; none: every run answers",
    )


def check_evaluations(
    evaluation: EvaluationConfig, best: str | None, objectives: Sequence[str], heldout_prompts: int
) -> None:
    """Refuse, in one line, what no evaluation while training could decide."""
    every, patience = evaluation.every_steps, evaluation.early_stopping_patience
    if every and not heldout_prompts:
        raise ValueError(
            f"{EVERY_STEPS}: found {every} with data.heldout_prompts 0, accepted: 0, or held-out prompts"
        )
    if patience is not None and best is None:
        raise ValueError(
            f"evaluation.early_stopping_patience: found {patience} without checkpoint.best, accepted: null, "
            "or checkpoint.best, which says what counts as better"
        )
    if best is None:
        return
    accepted = list(dict.fromkeys([*objectives, WORST_GAIN, HYPERVOLUME]))
    if best not in accepted:
        raise ValueError(f"checkpoint.best: found {best!r}, accepted: null, {', '.join(accepted)}")
    if best in objectives and best in (WORST_GAIN, HYPERVOLUME):
        raise ValueError(
            f"checkpoint.best: found {best}, which is both an objective and a measure of all of them; "
            "accepted: another name of that objective"
        )
    if not every:
        raise ValueError(
            f"checkpoint.best: found {best} with {EVERY_STEPS} 0, accepted: null, or {EVERY_STEPS} above 0 "
            "(the best is chosen among these evaluations)"
        )


def without_effect(best: str | None) -> tuple[str, ...]:
    """Prefixes of settings that change no number of a run: without a choice, evaluations only look."""
    return WITHOUT_EFFECT if best is not None else (*WITHOUT_EFFECT, EVERY_STEPS)
