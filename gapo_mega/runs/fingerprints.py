"""Fingerprints of what a run reads: rows that were kept, weights, a chat template."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gapo_mega.models.shape import ModelShape
from gapo_mega.types import Prompt

_WEIGHTS = ("*.safetensors", "*.bin", "*.distcp")
_WHOLE = 1 << 30  # bytes of a file up to which it is read whole
_PIECE, _PIECES = 1 << 20, 64  # bytes read at once, and how often in a larger file

# What a model is beside its weights: it is read anew when a run goes on.
_BESIDE_WEIGHTS = ("config.json", "tokenizer*", "chat_template*", "special_tokens_map.json")
# Lengths that a model may have: they compute nothing, and a run that exceeds them is refused.
_LIMITS = ("max_positions", "sliding_window")

Fingerprint = dict[str, Any]  # JSON


def of_rows(rows: Iterable[object]) -> Fingerprint:
    """Number and digest of ``rows`` in their order: texts, numbers, tensors, and tuples of such."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(repr(_plain(row)).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()[:16]}


def of_prompts(prompts: Iterable[Prompt]) -> Fingerprint:
    """A prompt's number in its file does not matter, its place does."""
    return of_rows((p.token_ids, p.text, p.messages, *sorted(p.columns.items())) for p in prompts)


def of_template(tokenizer: PreTrainedTokenizerBase, used: bool) -> Fingerprint:
    """Of the tokenizer's chat template; of none where none is ``used``."""
    template = tokenizer.chat_template if used else None
    return of_text(None if template is None else str(template))


def of_text(text: str | None) -> Fingerprint:
    """Length and digest of a text; that of nothing is its own."""
    data = b"" if text is None else text.encode("utf-8", "surrogatepass")
    return {"characters": -1 if text is None else len(text), "sha256": hashlib.sha256(data).hexdigest()[:16]}


def of_weights(directory: Path) -> Fingerprint:
    """Number, bytes and digest of the files of weights in ``directory``.

    Of files above a gigabyte it reads pieces from one end to the other: all of them would take minutes, and
    training changes every piece.
    """
    digest, size = hashlib.sha256(), 0
    files = sorted({file for pattern in _WEIGHTS for file in directory.glob(pattern)})
    for path in files:
        length = path.stat().st_size
        digest.update(f"{path.name} {length}\n".encode())
        size += length
        with path.open("rb") as file:
            if length <= _WHOLE:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                continue
            for number in range(_PIECES):
                file.seek((length - _PIECE) * number // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return {"files": len(files), "bytes": size, "sha256": digest.hexdigest()[:16]}


def of_shape(shape: ModelShape, **ids: object) -> Fingerprint:
    """What the configuration of a model says of its computation, and ``ids``: the tokens that end or pad."""
    found = {key: value for key, value in dataclasses.asdict(shape).items() if key not in _LIMITS}
    return found | ids


def of_score_model(directory: Path) -> Fingerprint:
    """As :func:`of_weights`, and one digest of its configuration, tokenizer and chat template."""
    digest = hashlib.sha256()
    for path in sorted({file for pattern in _BESIDE_WEIGHTS for file in directory.glob(pattern)}):
        digest.update(f"{path.name}\n".encode())
        digest.update(path.read_bytes())
    return of_weights(directory) | {"configuration and tokenizer": digest.hexdigest()[:16]}


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
