"""The tokenizer of a Hugging Face model, or one clear error."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gapo_mega.models.huggingface.links import refuse_links_outside


def read_tokenizer(place: str | Path, parameter: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub repository. Code that comes with it is never run.

    Raises ``ValueError``, beginning with ``parameter``, where there is none that transformers can read, or
    its vocabulary is missing.
    """
    refuse_links_outside(Path(place), parameter)
    try:
        # Explicit: otherwise transformers asks on the terminal whether to run the repository's code.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(place), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{parameter}: found {str(place)!r}, accepted: a directory or hub name with a tokenizer "
            f"({reason})"
        ) from error
    if (
        not tokenizer.get_vocab().keys()
        - tokenizer.get_added_vocab().keys()
        - set(tokenizer.all_special_tokens)
    ):
        # transformers builds one of the special tokens alone, to which every text is empty.
        raise ValueError(
            f"{parameter}: found {str(place)!r}, whose tokenizer has no tokens but special ones, accepted: a "
            "directory or hub name with the tokenizer's vocabulary (tokenizer.json, tokenizer.model)"
        )
    return tokenizer
