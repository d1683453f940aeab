"""Byte-level BPE written out from a GGUF file's own lists, to compare tokenizers with."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import gguf
import regex
from gguf import TokenType
from tokenizers.pre_tokenizers import ByteLevel

Words = Callable[[str], Iterator[str]]

VARIED_TEXT = [
    "Hello, world! It's 1234567 o'clock; we'll see... DON'T they'Re",
    "  leading, trailing and   inner   spaces   42   7  \t\ttabs\t9 \n\n\n newlines \r\n  end ",
    "Ünïcödé: naïve façade, Straße, Ελληνικά, русский, 中文字符, 日本語テキスト, العربية, 🙂👩‍👩‍👧 ½ ² ٣٤ Ⅷ",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2.5e-10]}  # 100%\n",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "",
]


def smollm_words(text: str) -> Iterator[str]:
    """GPT-2's rule between the digits, each of which is a word."""
    rule = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for part in regex.split(r"(\p{N})", text):
        yield from regex.findall(rule, part)


def llama3_words(text: str, digits: int = 3) -> Iterator[str]:
    """Contractions, words with one sign before them, up to three digits, signs, ends of lines, spaces."""
    contraction = r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
    spaces = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    signs = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    yield from regex.findall(rf"{contraction}|{word}|\p{{N}}{{1,{digits}}}|{signs}|{spaces}", text)


def qwen2_words(text: str) -> Iterator[str]:
    """As Llama 3, with every digit alone, of text in Unicode's composed form."""
    yield from llama3_words(unicodedata.normalize("NFC", text), digits=1)


class ReferenceTokenizer:
    """The ids of a text; with ``whole_words`` a word that is a token is not taken apart."""

    def __init__(self, path: Path, words: Words = smollm_words, *, whole_words: bool = False) -> None:
        reader = gguf.GGUFReader(path)
        self.words = words
        self.whole_words = whole_words
        self.tokens: list[str] = reader.get_field("tokenizer.ggml.tokens").contents()
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        merges = reader.get_field("tokenizer.ggml.merges").contents()
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        types = reader.get_field("tokenizer.ggml.token_type").contents()
        added = (TokenType.CONTROL, TokenType.USER_DEFINED)
        self.added = [token for token, kind in zip(self.tokens, types, strict=True) if kind in added]

    def __call__(self, text: str) -> list[int]:
        pieces = regex.split("(" + "|".join(map(regex.escape, self.added)) + ")", text)
        return [token for piece in pieces for token in self._piece(piece)]

    def _piece(self, piece: str) -> list[int]:
        if piece in self.added:
            return [self.ids[piece]]
        return [self.ids[token] for word in self.words(piece) for token in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        ((symbols, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
        if self.whole_words and symbols in self.ids:
            return [symbols]
        parts = list(symbols)
        while len(parts) > 1:
            rank, place = min(
                (self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(pairwise(parts))
            )
            if rank == len(self.ranks):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return parts
