"""Pairs and chats as tokens: rendered by a chat template, tokenized, padded.

Everything is a CPU tensor; token ids are int64. Shapes: P pairs, C chats, T token positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gapo_mega.data.chat_template import ChatTemplate, template_text
from gapo_mega.data.chats import Chat
from gapo_mega.data.pairs import Lengths, Pair
from gapo_mega.data.sequences import Sequences, kind_of, sequences_of
from gapo_mega.data.token_cache import TokenCache, digest_of, digest_of_piece
from gapo_mega.types import Message, TokenBatch

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PairIds = tuple[Tensor, Tensor]  # chosen and rejected conversation, each int64 [T]
ChatIds = tuple[Tensor, Tensor]  # int64 [T], and bool [T]: tokens that are learned
AnswerIds = tuple[ChatIds, ChatIds]  # chosen and rejected conversation, with the tokens of the answer
Spans = list[tuple[int, int]]  # [start, end) in characters
TEMPLATE_PARAMETER = "model.chat_template"
_AT_ONCE = 1000  # pairs whose responses are counted together
_PAIRS, _ANSWERS, _CHATS = kind_of("pairs"), kind_of("answers"), kind_of("chats")


def encode_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    max_tokens: int,
    cache: TokenCache | None = None,
) -> tuple[list[PairIds], list[Pair]]:
    """Both conversations of every pair that is short enough, and these pairs, in the order of ``pairs``.

    The chat template writes the special tokens, so the tokenizer adds none. A pair with a conversation of
    more than ``max_tokens`` tokens is left out, and counted in the log. ``cache``: where many pairs are
    looked up, and shared out over ranks, which call together; None: nothing is kept.

    Raises ``ValueError`` if none is left, and if the template refuses a conversation.
    """
    render = _Renderer(tokenizer, chat_template)

    def encode(some: Sequence[Pair]) -> Sequences:
        texts = _both_answered(render, some)
        ids = [torch.tensor(found, dtype=torch.int64) for found in _tokenized(tokenizer, texts)["input_ids"]]
        kept = [i for i in range(len(some)) if _longest(ids[2 * i : 2 * i + 2]) <= max_tokens]
        return Sequences(kept, [ids[row] for i in kept for row in (2 * i, 2 * i + 1)])

    digest = digest_of(tokenizer, render.text, {"max_tokens": max_tokens})
    found = sequences_of(_PAIRS, pairs, encode, cache, _key_of_pairs(digest))
    _count_left_out("pairs", len(found.index), len(pairs), max_tokens)
    return list(zip(found.ids[::2], found.ids[1::2], strict=True)), [pairs[i] for i in found.index]


def response_lengths(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Lengths]:
    """Tokens of the chosen and of the rejected response of every pair, without prompt and template."""
    lengths: list[Lengths] = []
    for start in range(0, len(pairs), _AT_ONCE):
        some = pairs[start : start + _AT_ONCE]
        texts = [text for pair in some for text in (pair.chosen, pair.rejected)]
        counts = [len(ids) for ids in _tokenized(tokenizer, texts)["input_ids"]]
        lengths += zip(counts[::2], counts[1::2], strict=True)
    return lengths


def encode_chats(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    max_tokens: int,
    cache: TokenCache | None = None,
    *,
    assistant_only: bool = True,
) -> list[ChatIds]:
    """Every chat that is short enough, with a mask of the tokens to learn, in the order of ``chats``.

    The mask is true on what the assistant produces: every token with a character of one of its messages, up
    to and with the special token that ends the turn (white space that the template writes after it is not
    produced). Without ``assistant_only`` it is true on every token but the first, which nothing predicts.
    Chats of more than ``max_tokens`` tokens are left out, and counted in the log. ``cache`` as in
    ``encode_pairs``.

    Raises ``ValueError`` if none is left, if the template refuses a chat or changes what is already said as
    a chat goes on, and for a tokenizer without character offsets.
    """
    if assistant_only and not tokenizer.is_fast:
        raise ValueError(
            f"assistant_only: found true with {type(tokenizer).__name__}, which gives no character offsets "
            "of tokens; accepted: false, or a model whose tokenizer is a fast one (tokenizer.json)"
        )
    render = _Renderer(tokenizer, chat_template)
    special = _special_ids(tokenizer)

    def encode(some: Sequence[Chat]) -> Sequences:
        texts = [render(chat.messages) for chat in some]
        tokens = _tokenized(tokenizer, texts, offsets=assistant_only)
        index, encoded = [], []
        for row, (chat, text) in enumerate(zip(some, texts, strict=True)):
            ids: list[int] = tokens["input_ids"][row]
            if len(ids) > max_tokens:
                continue
            mask = [True] * len(ids)
            if assistant_only:
                spans = _assistant_spans(render, chat.messages, text)
                mask = _produced(ids, tokens["offset_mapping"][row], spans, text, special)
            index.append(row)
            encoded.append(_learned(ids, mask))
        return Sequences(index, [ids_T for ids_T, _ in encoded], [mask_T for _, mask_T in encoded])

    digest = digest_of(tokenizer, render.text, {"max_tokens": max_tokens, "assistant_only": assistant_only})
    key = None if digest is None else lambda some: digest_of_piece(digest, (chat.messages for chat in some))
    found = sequences_of(_CHATS, chats, encode, cache, key)
    _count_left_out("chats", len(found.index), len(chats), max_tokens)
    return list(zip(found.ids, found.masks, strict=True))


def encode_answers(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    max_tokens: int,
    cache: TokenCache | None = None,
) -> tuple[list[AnswerIds], list[Pair]]:
    """``encode_pairs`` with a mask of the answer's tokens, the special token that ends it included.

    Raises ``ValueError`` as ``encode_pairs``, if the template changes what is already said when the answer
    comes, and for a tokenizer without character offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"model.path: found {type(tokenizer).__name__}, which gives no character offsets of tokens; "
            "accepted: a model whose tokenizer is a fast one (tokenizer.json)"
        )
    render = _Renderer(tokenizer, chat_template)
    special = _special_ids(tokenizer)

    def encode(some: Sequence[Pair]) -> Sequences:
        texts = _both_answered(render, some)
        tokens = _tokenized(tokenizer, texts, offsets=True)
        index: list[int] = []
        encoded: list[ChatIds] = []
        for number, pair in enumerate(some):
            asked = render(pair.prompt, asked=True)
            rows = (2 * number, 2 * number + 1)
            if _longest([tokens["input_ids"][row] for row in rows]) > max_tokens:
                continue
            index.append(number)
            encoded += (
                _answer(tokens["input_ids"][row], tokens["offset_mapping"][row], asked, texts[row], special)
                for row in rows
            )
        return Sequences(index, [ids_T for ids_T, _ in encoded], [mask_T for _, mask_T in encoded])

    digest = digest_of(tokenizer, render.text, {"max_tokens": max_tokens})
    found = sequences_of(_ANSWERS, pairs, encode, cache, _key_of_pairs(digest))
    _count_left_out("pairs", len(found.index), len(pairs), max_tokens)
    answers = list(zip(found.ids, found.masks, strict=True))
    return list(zip(answers[::2], answers[1::2], strict=True)), [pairs[i] for i in found.index]


def _answer(ids: list[int], offsets: Spans, asked: str, text: str, special: frozenset[int]) -> ChatIds:
    if not text.startswith(asked):
        raise ValueError(
            f"{TEMPLATE_PARAMETER}: changes what is already said when the answer comes, so the answer's "
            "tokens cannot be told apart; accepted: a template that writes the question alike with and "
            "without its answer"
        )
    return _learned(ids, _produced(ids, offsets, [(len(asked), len(text))], text, special))


def _learned(ids: list[int], mask: list[bool]) -> ChatIds:
    mask_T = torch.tensor(mask, dtype=torch.bool)
    mask_T[:1] = False  # nothing predicts the first token
    return torch.tensor(ids, dtype=torch.int64), mask_T


def pair_batch(
    pairs: Sequence[tuple[Tensor | Sequence[int], Tensor | Sequence[int]]], pad_id: int
) -> TokenBatch:
    """Pairs of token ids as ``[2P, T]``, chosen and rejected in turn, right padded with ``pad_id``.

    The mask is true once per row, where the score is read: at the last token that is not ``pad_id``.
    transformers' classifiers read it there too, even where a text itself ends in the pad token.
    """
    rows = [torch.as_tensor(ids, dtype=torch.int64) for pair in pairs for ids in pair]
    tokens_BT = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    positions_T = torch.arange(tokens_BT.shape[1])
    last_B = torch.where(tokens_BT != pad_id, positions_T, 0).amax(dim=1)
    return TokenBatch(tokens_BT, positions_T == last_B[:, None])


def chat_batch(
    chats: Sequence[tuple[Tensor | Sequence[int], Tensor | Sequence[bool]]], pad_id: int
) -> TokenBatch:
    """Token ids and masks as ``[C, T]``, right padded with ``pad_id``; the mask is false on the padding."""
    tokens = [torch.as_tensor(ids, dtype=torch.int64) for ids, _ in chats]
    masks = [torch.as_tensor(mask, dtype=torch.bool) for _, mask in chats]
    return TokenBatch(
        pad_sequence(tokens, batch_first=True, padding_value=pad_id),
        pad_sequence(masks, batch_first=True, padding_value=False),
    )


class _Renderer:
    """Renders conversations; where the template refuses one, ``model.chat_template`` is at fault."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self.text = template_text(tokenizer, chat_template, TEMPLATE_PARAMETER)
        self._template = ChatTemplate(tokenizer, self.text)

    def __call__(self, messages: Sequence[Message], *, asked: bool = False) -> str:
        try:
            return self._template.render(messages, asked=asked)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{TEMPLATE_PARAMETER}: refuses a conversation of {roles} ({error}); accepted: a template "
                "for the roles of the data"
            ) from None


def _assistant_spans(render: _Renderer, messages: Sequence[Message], text: str) -> Spans:
    """Where in ``text`` the assistant speaks: between a conversation that asks it and the answered one."""
    spans: Spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = render(messages[:i], asked=True), render(messages[: i + 1])
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise ValueError(
                "assistant_only: found true with a chat template that changes what is already said as a "
                "conversation goes on, so the assistant's tokens cannot be told apart; accepted: false, or "
                "another model.chat_template"
            )
        spans.append((len(asked), len(answered)))
    return spans


def _produced(
    ids: Sequence[int], offsets: Spans, spans: Spans, text: str, special: frozenset[int]
) -> list[bool]:
    """Per token, whether it has a character of ``spans`` and is not white space after the end of a turn."""
    mask = [False] * len(ids)
    for start, end in spans:
        inside = [t for t, (left, right) in enumerate(offsets) if left < end and right > start]
        for t in inside:
            mask[t] = True
            if ids[t] in special and not text[offsets[t][1] : end].strip():
                break
    return mask


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], offsets: bool = False
) -> BatchEncoding:
    # Not verbose: the limit is max_tokens, not the one that the tokenizer would warn of.
    tokens: BatchEncoding = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=offsets, truncation=False, verbose=False
    )
    return tokens


def _both_answered(render: _Renderer, pairs: Sequence[Pair]) -> list[str]:
    return [render(pair.answered(text)) for pair in pairs for text in (pair.chosen, pair.rejected)]


def _key_of_pairs(digest: str | None) -> Callable[[Sequence[Pair]], str] | None:
    """Of what is tokenised: the margins are not."""
    if digest is None:
        return None
    return lambda some: digest_of_piece(digest, ((pair.prompt, pair.chosen, pair.rejected) for pair in some))


def _longest(both: Sequence[Sized]) -> int:
    return max(len(ids) for ids in both)


def _count_left_out(what: str, kept: int, total: int, max_tokens: int) -> None:
    if not total:
        return
    logger.info("%d of %d %s, left out %d longer than %d tokens", kept, total, what, total - kept, max_tokens)
    if not kept:
        raise ValueError(
            f"model.max_tokens: found {max_tokens}, which is less than each of the {total} {what} has; "
            "accepted: more"
        )
