"""Where a model is: a local directory or a hub repository, and its tokenizer beside or within it."""

from __future__ import annotations

import os
from pathlib import Path

from gapo_mega.files import local
from gapo_mega.models.checkpoint_files import check_sizes

# Files to download from a hub repository; pickled weights only where it has no others.
_SAFE_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.safetensors"]
_PICKLED_PATTERNS = [*_SAFE_PATTERNS[:-1], "pytorch_model*.bin"]
_IGNORED_PATTERNS = ["consolidated*"]  # the same weights once more, in the form of Mistral's own code
COMPANIONS = "hf"  # folder of a Megatron checkpoint that holds what is beside the weights


def companions_of(path: Path) -> Path:
    """Where a model's configuration and tokenizer are: the directory itself, or a checkpoint's ``hf/``."""
    return path / COMPANIONS if (path / COMPANIONS / "config.json").is_file() else path


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a Megatron checkpoint, and no Hugging Face directory."""
    return (path / "metadata.json").is_file() and not (path / "config.json").is_file()


def resolve(name_or_path: str | Path, parameter: str = "model.path") -> Path:
    """The local directory of a model: ``name_or_path`` itself, or a download of that hub repository.

    Raises:
        ValueError: it is neither a directory nor a repository that can be reached, or a checkpoint that lacks
            a file or the end of one; ``parameter`` named it.
    """
    path = local(name_or_path)
    if os.path.isdir(path):  # pathlib raises for names that no file system has
        check_sizes(path, parameter)
        return path
    # Imported here: only models named by repository need the network client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(
            snapshot_download(
                str(name_or_path), allow_patterns=_SAFE_PATTERNS, ignore_patterns=_IGNORED_PATTERNS
            )
        )
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(name_or_path), allow_patterns=_PICKLED_PATTERNS))
        return found
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{parameter}: found {str(name_or_path)!r}, which is neither a local directory (looked at "
            f"{path.absolute()}) nor a Hugging Face repository, cached or within reach: {reason}"
        ) from error
