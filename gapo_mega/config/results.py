"""What a run leaves behind: the sections of checkpoints and of the answers before and after training."""

from __future__ import annotations

from pydantic import Field

from gapo_mega.config.fields import LocalPath, Section

# Prefixes of settings that say where and what a run writes, and change no number.
WITHOUT_EFFECT = ("checkpoint.", "logging.", "evaluation.shown", "evaluation.shared")


class CheckpointConfig(Section):
    """Resumable state in Megatron's torch_dist format."""

    every_steps: int = Field(0, ge=0, description="0: only on SIGTERM and at the end")
    keep: int = Field(2, ge=1, description="complete checkpoints kept")
    resume: bool = Field(True, description="continue from the newest complete checkpoint of output_dir")
    save_final: bool = Field(False, description="also keep a resumable checkpoint of the last step")
    export_hf: bool = Field(True, description="write the trained policy as a Hugging Face directory")


class EvaluationConfig(Section):
    """Held-out scores before and after training: paired, same prompts, same sampling seed."""

    samples_per_prompt: int = Field(1, ge=1, description="responses to every held-out prompt")
    shown: int = Field(6, ge=0, description="sample responses shown in the report")
    shared: LocalPath | None = Field(
        None,
        description="directory where the answers before training are kept for, and taken from, runs that "
        "begin alike: model, held-out rows, sampling, objectives, seed, layout; none: every run answers",
    )
