"""Tokenizers of GGUF files, rebuilt from the vocabulary that the file lists.

Two kinds: SentencePiece's BPE ("llama" in the file), whose merges follow from the scores of the pieces, and
byte-level BPE ("gpt2"), whose merges are listed but whose rule for splitting text into words is only named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from gapo_mega.models.gguf.config import architecture, token_id
from gapo_mega.models.gguf.file import GGUFFile

_KEY = "tokenizer.ggml."
_SPACE = "▁"  # SentencePiece's
_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
# Llama 3 and Qwen2 split text by the same rule, except for how many digits a word may have.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_tokenizer(file: GGUFFile, config: PreTrainedConfig, directory: str) -> None:
    """Write the tokenizer of ``file`` with its chat templates into ``directory``.

    Args:
        file: the GGUF file.
        config: the model's configuration, for the rows of the embedding and the longest sequence.
        directory: an existing directory; ``AutoTokenizer.from_pretrained`` finds the same tokenizer there.

    Raises:
        ValueError: another kind of vocabulary, or one that would split text differently as a tokenizer.
    """
    file.require(_KEY + "model", *_BUILDERS)
    if (
        architecture(file) == "qwen2"
    ):  # AutoTokenizer gives such models Qwen2's rules whatever their files say
        file.require(_KEY + "model", "gpt2")
        file.require(_KEY + "pre", "qwen2")
    vocabulary = _Vocabulary.read(file, config.vocab_size)
    tokenizer = _BUILDERS[str(file.get(_KEY + "model"))](file, vocabulary)
    tokenizer.add_tokens(vocabulary.added())
    special = {f"{name}_token": vocabulary.special(file, name) for name in ("bos", "eos", "pad", "unk")}
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        **special,
        **_ends(file, special["bos_token"], special["eos_token"]),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _chat_templates(file)
    wrapped.save_pretrained(directory)


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens and their kinds by id, without the unused ones at the end that only fill the embedding."""

    tokens: list[str]
    types: list[int]

    @classmethod
    def read(cls, file: GGUFFile, rows: int) -> _Vocabulary:
        tokens = file.strings(_KEY + "tokens")
        types = file.integers(_KEY + "token_type", len(tokens))
        if len(tokens) > rows:
            raise file.error(
                _KEY + "tokens", f"a list of {len(tokens)}", f"at most the embedding's {rows} rows"
            )
        for kind in set(types) - set(TokenType):
            raise file.error(_KEY + "token_type", kind, [int(known) for known in TokenType])
        used = max((i + 1 for i, kind in enumerate(types) if kind != TokenType.UNUSED), default=0)
        twice = [token for token, count in Counter(tokens[:used]).items() if count > 1]
        if twice:
            raise file.error(_KEY + "tokens", twice[:3], "tokens that differ")
        return cls(tokens[:used], types[:used])

    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def of(self, *kinds: TokenType) -> list[str]:
        """Tokens of these kinds, in the order of their ids."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds]

    def added(self) -> list[AddedToken]:
        """Tokens that are looked up in the text before it is split; all but user-defined ones are special."""
        kinds = zip(self.tokens, self.types, strict=True)
        return [
            AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED)
            for token, kind in kinds
            if kind in _ADDED
        ]

    def special(self, file: GGUFFile, name: str) -> str | None:
        """The text of a special token, ``None`` without one."""
        index = token_id(file, name, len(self.tokens))
        return None if index is None else self.tokens[index]


def _sentencepiece(file: GGUFFile, vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece BPE, with a space before the text and after each special token, as in llama.cpp."""
    file.require(_KEY + "pre", None, "default")
    file.require(_KEY + "remove_extra_whitespaces", None, False)
    file.require(_KEY + "precompiled_charsmap", None)
    if sorted(vocabulary.of(TokenType.BYTE)) != [f"<0x{byte:02X}>" for byte in range(256)]:
        raise file.error(
            _KEY + "token_type", vocabulary.of(TokenType.BYTE)[:3], "a token for each byte, <0x00> to <0xFF>"
        )
    for token in vocabulary.of(TokenType.USER_DEFINED):
        if _SPACE in token:
            raise file.error(_KEY + "tokens", token, f"user-defined tokens without {_SPACE}")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary.ids(),
            merges=_merges_by_score(file, vocabulary),
            unk_token=vocabulary.special(file, "unk"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space_before = file.flag(_KEY + "add_space_prefix", True)
    replaced = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_before:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced])
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = replaced
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_by_score(file: GGUFFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best score first; ties in transformers' order.

    SentencePiece joins the two neighbours that make the best piece, wherever training had cut that piece.
    Among equal scores it takes the leftmost pair. No order of pairs expresses that, except for runs of one
    character (Mistral has runs of spaces): there, taking the longest left half first is the same.
    """
    all_scores = file.numbers(_KEY + "scores", len(file.strings(_KEY + "tokens")))
    scores = dict(zip(vocabulary.tokens, all_scores, strict=False))
    pieces = set(vocabulary.of(TokenType.NORMAL))
    merges = []
    for piece, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == TokenType.NORMAL:
            if len(piece) > 1 and not pieces.issuperset(piece):
                raise file.error(_KEY + "tokens", piece, "pieces of characters that are tokens themselves")
            merges += _halves(piece, pieces)
        elif kind == TokenType.UNUSED and _halves(piece, pieces):
            # SentencePiece joins into an unused piece and splits it again, which merges cannot express.
            raise file.error(
                _KEY + "token_type", f"{kind} (unused) for {piece!r}", "1 for what texts lead to"
            )
    _refuse_ties(file, {left + right for left, right in merges}, scores)
    merges.sort(key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))
    return merges


def _halves(piece: str, pieces: Collection[str]) -> list[tuple[str, str]]:
    pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in pieces and right in pieces]


def _refuse_ties(file: GGUFFile, pieces: Collection[str], scores: dict[str, float]) -> None:
    by_score: dict[float, list[str]] = {}
    for piece in pieces:
        by_score.setdefault(scores[piece], []).append(piece)
    for score, tied in by_score.items():
        if len(tied) > 1 and len(set("".join(tied))) > 1:
            found = f"{score} for {len(tied)} tokens such as {sorted(tied)[:3]}"
            raise file.error(_KEY + "scores", found, "a score of its own for every token that others make")


def _byte_level(file: GGUFFile, vocabulary: _Vocabulary) -> Tokenizer:
    """Byte-level BPE with the merges of the file."""
    file.require(_KEY + "pre", *_WORD_RULES)
    file.require(_KEY + "add_space_prefix", None, False)
    rule = str(file.get(_KEY + "pre"))
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary.ids(),
            merges=_listed_merges(file, vocabulary),
            ignore_merges=rule == "llama-bpe",  # a word that is a token stays whole
        )
    )
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _WORD_RULES[rule]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _listed_merges(file: GGUFFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    pieces = set(vocabulary.of(TokenType.NORMAL))
    merges = []
    for line in file.strings(_KEY + "merges"):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= pieces:
            raise file.error(_KEY + "merges", line, "two tokens that make a token, with a space between")
        merges.append((left, right))
    return merges


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = Regex(_WORDS.replace("DIGITS", digits))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# How text becomes words, by llama.cpp's name of the rule.
_WORD_RULES: dict[str, pre_tokenizers.PreTokenizer] = {
    # Digits are split off *before* the byte-level rule sees the text; otherwise the
    # spaces before a number merge differently from what the model was trained on.
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
_BUILDERS: dict[str, Callable[[GGUFFile, _Vocabulary], Tokenizer]] = {
    "llama": _sentencepiece,
    "gpt2": _byte_level,
}


def _ends(file: GGUFFile, bos: str | None, eos: str | None) -> dict[str, bool]:
    """Whether texts get a bos and an eos token; llama.cpp's default where the file does not say."""
    bos_default = file.get(_KEY + "model") == "llama" or file.get(_KEY + "pre") == "llama-bpe"
    added = {
        "bos": file.flag(_KEY + "add_bos_token", bos_default),
        "eos": file.flag(_KEY + "add_eos_token", False),
    }
    for name, token in (("bos", bos), ("eos", eos)):
        if added[name] and token is None:
            raise file.error(f"{_KEY}{name}_token_id", None, f"a token, which texts get (add_{name}_token)")
    return {f"add_{name}_token": value for name, value in added.items()}


def _chat_templates(file: GGUFFile) -> str | dict[str, str] | None:
    """The chat template, or all by name where there are several."""
    default = file.text("tokenizer.chat_template")
    key = "tokenizer.chat_templates"
    names = [] if file.get(key) is None else file.strings(key)
    named = {name: file.text(f"tokenizer.chat_template.{name}") or "" for name in names}
    if not named:
        return default
    return named if default is None else {"default": default, **named}
