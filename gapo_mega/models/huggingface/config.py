"""The configuration of a Hugging Face model, or one clear error."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from gapo_mega.models.huggingface.links import refuse_links_outside

# What transformers raises for a config.json that is missing, broken, incomplete or absurd.
_ADAPTER = "adapter_config.json"  # of PEFT; transformers puts such weights on top of the model's own
_ERRORS = (OSError, ValueError, KeyError, TypeError, ArithmeticError, StrictDataclassError)


def read_config(place: str | Path, parameter: str = "model.path") -> PreTrainedConfig:
    """The configuration of a model directory or hub repository. Code that comes with it is never run.

    Raises ``ValueError``, beginning with ``parameter``, where there is none that transformers can read.
    """
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise ValueError(
            f"{parameter}: {place} has no config.json; accepted: a Hugging Face directory, or a Megatron "
            "checkpoint written by gapo_mega"
        )
    refuse_links_outside(Path(place), parameter)
    if (Path(place) / _ADAPTER).is_file():
        raise ValueError(
            f"{parameter}: {place} has an {_ADAPTER}, which is not read; accepted: a directory without it, "
            "its adapter merged into the weights"
        )
    try:
        # Explicit: otherwise transformers asks on the terminal whether to run the repository's code.
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(place), trust_remote_code=False)
    except _ERRORS as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{parameter}: found {str(place)!r}, accepted: a Hugging Face directory or hub name with a sound "
            f"configuration, or a Megatron checkpoint written by gapo_mega ({type(error).__name__}: {reason})"
        ) from error
    return config
