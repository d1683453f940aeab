"""Token ids and the model's vocabulary: which ids end a response, and that each has its embedding."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_NAMED = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
# One of these makes a directory one with a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def has_tokenizer(companions: Path) -> bool:
    """Whether a local directory has a tokenizer; one for measurements or plans may do without."""
    return any((companions / file).is_file() for file in _TOKENIZER_FILES)


def check_tokens(companions: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """``check_vocabulary`` and ``check_named_ids`` for the model of ``model.path``."""
    check_vocabulary(tokenizer, vocab)
    check_named_ids(companions, vocab)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab: int, parameter: str = "model.path") -> None:
    """Refuse a tokenizer with a token that the model's embedding has no row for.

    An embedding may have more rows than the tokenizer has tokens. Megatron pads it, so that ids somewhat
    beyond its end would read rows that nobody trained.

    Args:
        tokenizer: the tokenizer, with its added tokens.
        vocab: rows of the embedding, without padding.
        parameter: what the error begins with.
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    beyond = sorted((index, token) for token, index in ids.items() if not 0 <= index < vocab)
    if beyond:
        index, token = beyond[0]
        others = f" and {len(beyond) - 1} others" if len(beyond) > 1 else ""
        raise ValueError(
            f"{parameter}: the tokenizer of {tokenizer.name_or_path} has the token {token!r} with the id "
            f"{index}{others}, accepted: 0 to {vocab - 1} (the model's vocab_size is {vocab}; resize its "
            "embedding, or remove the token)"
        )
    # What a tokenizer puts around a text has ids of its own.
    framed: list[int] = tokenizer("a")["input_ids"]
    if any(not 0 <= index < vocab for index in framed):
        raise ValueError(
            f"{parameter}: the tokenizer of {tokenizer.name_or_path} gives 'a' the ids {framed}, accepted: 0 "
            f"to {vocab - 1} (the model's vocab_size is {vocab})"
        )


def check_named_ids(companions: Path, vocab: int, parameter: str = "model.path") -> None:
    """Refuse ids of special tokens, in the model's configuration files, that are none of the vocabulary.

    ``pad_token_id`` may be -1, with which old Llama checkpoints say that there is none.
    """
    for file in (_CONFIG, _GENERATION):
        if (companions / file).is_file():
            content = _read(companions / file, parameter)
            for field in _NAMED:
                _check_ids(content.get(field), vocab, field, f"{parameter}: {companions / file} {field}")


def padding_id(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> int:
    """The id that pads prompts and responses: the tokenizer's, or the first of ``eos_ids``."""
    found = tokenizer.pad_token_id
    return int(found) if found is not None else eos_ids[0]


def end_of_sequence_ids(
    companions: Path, tokenizer: PreTrainedTokenizerBase, parameter: str = "model.path"
) -> list[int]:
    """Ids that end a response, those at which transformers' ``generate`` stops.

    They are those of ``generation_config.json``, without such a file those of ``config.json``. Where the
    former names none, ``generate`` would never stop; then those of ``config.json`` are taken. The tokenizer's
    end counts where neither names one.

    Raises ``ValueError`` where nobody names one.
    """
    files = [file for file in (_GENERATION, _CONFIG) if (companions / file).is_file()] or [_CONFIG]
    for file in files:
        named = _read(companions / file, parameter).get("eos_token_id")
        ids = [named] if isinstance(named, int) else list(named or ())
        if ids:
            break
    end = tokenizer.eos_token_id
    if not ids and end is None:
        raise ValueError(
            f"{parameter}: {companions} names no end-of-sequence token; accepted: a model with a tokenizer "
            "that has one"
        )
    if ids and end is not None and end not in ids:
        logger.warning(
            "%s: responses end at the ids %s of %s; the tokenizer's own end %r (%d) is not among them",
            companions,
            ids,
            file,
            tokenizer.eos_token,
            end,
        )
    return list(dict.fromkeys(ids or [int(end)]))


def _read(file: Path, parameter: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{parameter}: {file} cannot be read ({error}); accepted: a JSON object") from error
    if not isinstance(content, dict):
        raise ValueError(f"{parameter}: {file} holds {type(content).__name__}, accepted: a JSON object")
    return content


def _check_ids(found: object, vocab: int, field: str, what: str) -> None:
    if found is None or (field == "pad_token_id" and found == -1 and not isinstance(found, bool)):
        return
    ids = found if field == "eos_token_id" and isinstance(found, list) else [found]
    for index in ids:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < vocab:
            raise ValueError(
                f"{what}: found {found!r}, accepted: null, or 0 to {vocab - 1} (vocab_size {vocab})"
            )
