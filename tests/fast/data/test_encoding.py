"""Tokens, masks and padding, against what transformers makes of the same conversations.

The masks are compared with those that transformers takes from ``{% generation %}`` marks of a template, which
ours does not read.
"""

from __future__ import annotations

import json
import logging
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gapo_mega.data.chats import Chat
from gapo_mega.data.encoding import (
    chat_batch,
    encode_answers,
    encode_chats,
    encode_pairs,
    pair_batch,
    response_lengths,
)
from gapo_mega.data.pairs import Pair

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>"]
CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The blank after the colon becomes a part of the answer's first token.
BLANK_MERGES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'Assistant: ' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# Nothing is written to make the assistant answer, as in the templates of Llama 2 and Mistral.
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# No token ends a turn: the blank line is all that the model can learn to stop at.
BLANK_LINE_ENDS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\n' }}"
    "{% generation %}{{ m.content + '\n\n' }}{% endgeneration %}"
    "{% else %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "blank_merges": BLANK_MERGES,
    "instruction": INSTRUCTION,
    "blank_line_ends": BLANK_LINE_ENDS,
}


def said(*turns: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    head = () if system is None else ({"role": "system", "content": system},)
    return (
        *head,
        *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)),
    )


CHATS = [
    Chat(said("What is a comma?", "A mark: it parts words, as here.")),
    Chat(said("Hi", "Hello there", "And 你好 🎉?", "🎉 naïve: 1234\n\n- x\n- y\n", system="Be brief.")),
    Chat(said("a", "b", "c", "d\n\n", "e", "The mark <|im_end|> ends a turn.\n\nYes.")),
]
PAIRS = [
    Pair(said("What is a comma?"), "A mark.", "I do not know what that would be."),
    Pair(said("Hi", "Hello", "Bye", system="Be brief."), "See you.", "No " * 60),
]


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer in the manner of GPT-2 (bytes) or of Llama 2 (sentencepiece)."""
    inner = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece", unk_token=None))
    alphabet = []
    if kind == "bytes":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Metaspace()
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)] if kind == "sentencepiece" else []
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL] + byte_tokens,
        show_progress=False,
    )
    inner.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    content = json.loads(inner.to_str())  # bytes are given to the trainer as special tokens, but are none
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIAL]
    inner = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param != "smollm2":
        return trained(request.param)
    return AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_marks_in_the_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    template = TEMPLATES[name]
    encoded = encode_chats(CHATS, tokenizer, template, 500)
    assert len(encoded) == len(CHATS)
    for (ids, mask), chat in zip(encoded, CHATS, strict=True):
        expected = tokenizer.apply_chat_template(
            list(chat.messages), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids.tolist() == expected["input_ids"] and ids.dtype == torch.int64
        assert mask.tolist() == [bool(m) for m in expected["assistant_masks"]] and mask.dtype == torch.bool
        assert mask.any() and not mask.all()


def test_a_prefix_of_the_text_is_not_always_a_prefix_of_the_tokens() -> None:
    """The case that offsets are for: counting the tokens of the rendered prompt would be off."""
    tokenizer = trained("bytes")
    chat = CHATS[0]
    asked = tokenizer.apply_chat_template(
        list(chat.messages[:1]), chat_template=BLANK_MERGES, add_generation_prompt=True, return_dict=False
    )
    ((ids, mask),) = encode_chats([chat], tokenizer, BLANK_MERGES, 500)
    assert ids.tolist()[: len(asked)] != asked
    assert tokenizer.decode(ids[mask]).strip() == chat.messages[1]["content"] + "<|im_end|>"


def test_the_models_own_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        with pytest.raises(ValueError, match=r"^model.chat_template: not given, and the tokenizer"):
            encode_chats(CHATS[:1], tokenizer, None, 500)
        return
    ((ids, mask),) = encode_chats(CHATS[:1], tokenizer, None, 500)
    assert ids.tolist() == tokenizer.apply_chat_template(list(CHATS[0].messages), return_dict=False)
    assert tokenizer.decode(ids[mask]) == "A mark: it parts words, as here.<|im_end|>"


def test_learning_all_tokens_leaves_the_first_out(tokenizer: PreTrainedTokenizerBase) -> None:
    for ids, mask in encode_chats(CHATS, tokenizer, CHATML, 500, assistant_only=False):
        assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_pairs_are_rendered_whole(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    encoded, all_of_them = encode_pairs(PAIRS, tokenizer, CHATML, 500)
    assert all_of_them == list(PAIRS)
    for pair, both in zip(PAIRS, encoded, strict=True):
        for ids, response in zip(both, (pair.chosen, pair.rejected), strict=True):
            expected = tokenizer.apply_chat_template(
                pair.answered(response), chat_template=CHATML, return_dict=False
            )
            assert ids.tolist() == expected and ids.dtype == torch.int64
    longest = max(len(ids) for ids in encoded[1])
    with caplog.at_level(logging.INFO):
        kept, pairs = encode_pairs(PAIRS, tokenizer, CHATML, longest - 1)
    assert len(kept) == 1 and all(map(torch.equal, kept[0], encoded[0])) and pairs == [PAIRS[0]]
    assert f"1 of 2 pairs, left out 1 longer than {longest - 1} tokens" in caplog.text
    assert len(encode_pairs(PAIRS, tokenizer, CHATML, longest)[0]) == 2
    for encode, items in ((encode_pairs, PAIRS), (encode_chats, CHATS)):
        with pytest.raises(ValueError, match=r"^model.max_tokens: found 3, which is less than each"):
            encode(items, tokenizer, CHATML, 3)  # type: ignore[operator]


def test_response_lengths_leave_prompt_and_template_out(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = [
        tuple(len(tokenizer.encode(text, add_special_tokens=False)) for text in (p.chosen, p.rejected))
        for p in PAIRS
    ]
    assert response_lengths(PAIRS, tokenizer) == expected


def test_many_items_keep_their_order() -> None:
    """More than go to the tokenizer at once."""
    tokenizer, times = trained("bytes"), 700
    pairs, _ = encode_pairs(PAIRS, tokenizer, CHATML, 500)
    chats = encode_chats(CHATS, tokenizer, CHATML, 500)
    many_pairs, _ = encode_pairs(PAIRS * times, tokenizer, CHATML, 500)
    many_chats = encode_chats(CHATS * times, tokenizer, CHATML, 500)
    assert len(many_pairs) == len(pairs) * times and len(many_chats) == len(chats) * times
    assert all(map(torch.equal, chain(*many_pairs), chain(*(pairs * times))))
    assert all(map(torch.equal, chain(*many_chats), chain(*(chats * times))))
    assert response_lengths(PAIRS * times, tokenizer) == response_lengths(PAIRS, tokenizer) * times


def test_templates_from_files_and_wrong_ones(tmp_path: Path) -> None:
    tokenizer = trained("bytes")
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    from_file = encode_chats(CHATS, tokenizer, str(tmp_path / "own.jinja"), 500)
    from_text = encode_chats(CHATS, tokenizer, CHATML, 500)
    assert all(map(torch.equal, chain(*from_file), chain(*from_text)))
    with pytest.raises(ValueError, match=r"^model.chat_template: file .*none.jinja not found"):
        encode_chats(CHATS, tokenizer, str(tmp_path / "none.jinja"), 500)
    refusing = "{{ raise_exception('no system here') }}"
    with pytest.raises(
        ValueError, match=r"^model.chat_template: refuses .* system, user, assistant.*no system here"
    ):
        encode_pairs(PAIRS[1:], tokenizer, refusing, 500)
    # Shows only the last answer, as templates do that drop earlier reasoning.
    forgetful = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"^assistant_only: found true with a chat template that changes"):
        encode_chats(CHATS[1:2], tokenizer, forgetful, 500)
    assert len(encode_chats(CHATS[1:2], tokenizer, forgetful, 500, assistant_only=False)) == 1


def test_padding_is_that_of_transformers() -> None:
    tokenizer = trained("bytes")
    tokenizer.padding_side = "right"
    pad = tokenizer.pad_token_id
    pairs, _ = encode_pairs(PAIRS, tokenizer, CHATML, 500)
    batch = pair_batch(pairs, pad)
    rows = [ids.tolist() for both in pairs for ids in both]
    expected = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert torch.equal(batch.tokens_BT, expected["input_ids"]) and batch.tokens_BT.dtype == torch.int64
    assert batch.response_mask_BT.dtype == torch.bool
    marks = batch.response_mask_BT.nonzero()
    assert torch.equal(marks[:, 0], torch.arange(len(rows)))
    assert torch.equal(marks[:, 1], expected["attention_mask"].sum(1) - 1)
    chats = encode_chats(CHATS, tokenizer, CHATML, 500)
    chat_rows = chat_batch(chats, pad)
    tokens_CT, mask_CT = chat_rows.tokens_BT, chat_rows.response_mask_BT
    expected = tokenizer.pad({"input_ids": [ids.tolist() for ids, _ in chats]}, return_tensors="pt")
    assert torch.equal(tokens_CT, expected["input_ids"]) and mask_CT.dtype == torch.bool
    assert not mask_CT[expected["attention_mask"] == 0].any()
    assert [row[mask].tolist() for row, mask in zip(tokens_CT, mask_CT, strict=True)] == [
        ids[mask].tolist() for ids, mask in chats
    ]
    as_lists = [(chosen.tolist(), rejected.tolist()) for chosen, rejected in pairs]
    again = pair_batch(as_lists, pad)
    assert torch.equal(again.tokens_BT, batch.tokens_BT)
    assert torch.equal(again.response_mask_BT, batch.response_mask_BT)


def test_scores_are_taken_before_pad_tokens_of_the_text_itself() -> None:
    batch = pair_batch([([5, 7, 0, 0], [5, 0, 6]), ([0, 0], [9])], pad_id=0)
    assert batch.tokens_BT.tolist() == [[5, 7, 0, 0], [5, 0, 6, 0], [0, 0, 0, 0], [9, 0, 0, 0]]
    assert batch.response_mask_BT.nonzero().tolist() == [[0, 1], [1, 2], [2, 0], [3, 0]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_what_marks_in_the_template_say_of_the_last_turn(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    template = TEMPLATES[name]
    encoded, kept = encode_answers(PAIRS, tokenizer, template, 500)
    assert kept == PAIRS
    for both, pair in zip(encoded, PAIRS, strict=True):
        for (ids, mask), text in zip(both, (pair.chosen, pair.rejected), strict=True):
            expected = tokenizer.apply_chat_template(
                pair.answered(text),
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            said_by_assistant = torch.tensor(expected["assistant_masks"], dtype=torch.bool)
            end = int(said_by_assistant.nonzero().max()) + 1
            start = int((~said_by_assistant[:end]).nonzero().max()) + 1
            assert ids.tolist() == expected["input_ids"]
            assert mask.nonzero().flatten().tolist() == list(range(start, end))


def test_a_pair_with_one_long_answer_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        encoded, kept = encode_answers(PAIRS, trained("bytes"), CHATML, 100)
    assert kept == PAIRS[:1] and len(encoded) == 1
    assert "1 of 2 pairs, left out 1 longer than 100 tokens" in caplog.text


def test_a_template_that_changes_the_question_has_no_answer() -> None:
    with pytest.raises(ValueError, match=r"^model\.chat_template: changes what is already said when"):
        encode_answers(PAIRS, trained("bytes"), "{{ messages | length }}: {{ messages[-1].content }}", 500)
