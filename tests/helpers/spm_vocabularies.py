"""SentencePiece models learned from this project's documents, and the GGUF keys of such vocabularies."""

from __future__ import annotations

import io
from pathlib import Path

from gguf import TokenType
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from tests.helpers.gguf_files import Metadata, single_bytes_spm

KEY = "tokenizer.ggml."
# Lines that say nothing of these vocabularies: SentencePiece reads its own sign for spaces as a space, and
# takes the names of special tokens for text.
CORPUS = [
    line
    for file in sorted((Path(__file__).resolve().parents[2] / "docs").glob("*.md"))
    for line in file.read_text(encoding="utf-8").splitlines()
    if not any(sign in line for sign in ("▁", "<s>", "</s>", "<unk>"))
]


def trained_spm(**options: object) -> SentencePieceProcessor:
    """SentencePiece BPE with the settings of Llama and Mistral, learned from this project's documents."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def with_tied_runs(spm: SentencePieceProcessor) -> SentencePieceProcessor:
    """As Mistral's: runs of 2 to 16 spaces, all with one score below all others."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(spm.serialized_model_proto())
    kept = [piece for piece in proto.pieces if set(piece.piece) != {"▁"} or len(piece.piece) == 1]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    for length in range(2, 17):
        proto.pieces.add(piece="▁" * length, score=-1e9)
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def spm_vocabulary(spm: SentencePieceProcessor, **changes: object) -> Metadata:
    """The keys that llama.cpp's converter writes for a SentencePiece model."""

    def kind(index: int) -> TokenType:
        found = {
            TokenType.UNKNOWN: spm.IsUnknown(index),
            TokenType.CONTROL: spm.IsControl(index),
            TokenType.UNUSED: spm.IsUnused(index),
            TokenType.BYTE: spm.IsByte(index),
        }
        return next((kind for kind, applies in found.items() if applies), TokenType.NORMAL)

    ids = range(spm.vocab_size())
    vocabulary = single_bytes_spm() | {
        KEY + "tokens": [spm.IdToPiece(i) for i in ids],
        KEY + "scores": [spm.GetScore(i) for i in ids],
        KEY + "token_type": [kind(i) for i in ids],
    }
    return vocabulary | {KEY + key: value for key, value in changes.items()}


def with_added(vocabulary: Metadata, tokens: list[str], kinds: list[TokenType]) -> Metadata:
    """The vocabulary with more tokens behind its own."""
    changed = dict(vocabulary)
    more = {"tokens": tokens, "token_type": kinds, "scores": [-1000.0] * len(tokens)}
    for key, items in more.items():
        if KEY + key in changed:
            known = changed[KEY + key]
            assert isinstance(known, list)
            changed[KEY + key] = known + items
    return changed
