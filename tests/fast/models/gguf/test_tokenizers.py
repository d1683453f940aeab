"""Tokenizers out of GGUF files against SentencePiece itself and byte-level BPE written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
from gguf import TokenType
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gapo_mega.models.gguf.importing import import_gguf
from tests.helpers.gguf_files import (
    Metadata,
    byte_level,
    metadata_of,
    single_bytes_spm,
    tensors_of,
    write_gguf,
)
from tests.helpers.reference_tokenizers import (
    VARIED_TEXT,
    ReferenceTokenizer,
    Words,
    llama3_words,
    qwen2_words,
    smollm_words,
)
from tests.helpers.spm_vocabularies import (
    CORPUS,
    KEY,
    spm_vocabulary,
    trained_spm,
    with_added,
    with_tied_runs,
)
from tests.helpers.tiny import tiny_llama, tiny_qwen2, tiny_qwen3

ROWS = 1600


def mixed_texts(count: int = 60) -> list[str]:
    """Lines of documents, runs of one character, and signs at random."""
    random = Random(0)
    signs = [*"a \n\t1é中🙂", "ab", "   ", "23", "'s", "'LL", "e\u0301", "--", "the", "\r\n"]
    texts = [" " * length + "x" + "  " * length for length in range(1, 40, 3)] + ["a" * 37, "=" * 50]
    texts += random.sample([line for line in CORPUS if line], count)
    return texts + ["".join(random.choices(signs, k=random.randrange(1, 30))) for _ in range(count)]


TEXTS = [*VARIED_TEXT, *mixed_texts()]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    """A model of an architecture, with rows for every vocabulary here."""
    tiny = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}
    made: dict[str, PreTrainedModel] = {}

    def model(name: str) -> PreTrainedModel:
        if name not in made:
            made[name] = tiny[name](tmp_path_factory.mktemp(name), vocab=ROWS)
        return made[name]

    return model


Imported = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture
def imported(tmp_path: Path, network: Callable[[str], PreTrainedModel]) -> Imported:
    """Import a file with a vocabulary; the tokenizer is what ``AutoTokenizer`` reads from the directory."""

    def tokenizer(vocabulary: Metadata, name: str = "llama") -> PreTrainedTokenizerBase:
        model = network(name)
        path = write_gguf(tmp_path / "model.gguf", metadata_of(model, vocabulary), tensors_of(model))
        import_gguf(path, tmp_path / "out")
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "out")
        return loaded

    return tokenizer


@pytest.fixture(scope="module")
def spm() -> SentencePieceProcessor:
    return trained_spm()


@pytest.mark.parametrize("change", [lambda spm: spm, with_tied_runs], ids=["trained", "tied_runs"])
def test_sentencepiece_ids(
    imported: Imported,
    spm: SentencePieceProcessor,
    change: Callable[[SentencePieceProcessor], SentencePieceProcessor],
) -> None:
    expected = change(spm)
    tokenizer = imported(spm_vocabulary(expected))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == expected.encode(text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer("a b").input_ids == [1, *expected.encode("a b")]
    assert len(tokenizer) == expected.vocab_size()


def test_the_order_of_scores_shows(imported: Imported, spm: SentencePieceProcessor) -> None:
    vocabulary = spm_vocabulary(spm)
    scores = vocabulary[KEY + "scores"]
    assert isinstance(scores, list)
    vocabulary[KEY + "scores"] = [-score for score in scores]
    tokenizer = imported(vocabulary)
    assert any(
        tokenizer(text, add_special_tokens=False).input_ids != spm.encode(text) for text in CORPUS[:20]
    )


def test_no_space_before_the_text(imported: Imported) -> None:
    expected = trained_spm(add_dummy_prefix=False)
    tokenizer = imported(spm_vocabulary(expected, add_space_prefix=False))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == expected.encode(text), text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (False, None), (True, True), (False, True)])
def test_first_and_last_tokens(imported: Imported, bos: bool | None, eos: bool | None) -> None:
    """What the file leaves open is as llama.cpp has it: a first token for SentencePiece, no last one."""
    tokenizer = imported(single_bytes_spm() | {KEY + "add_bos_token": bos, KEY + "add_eos_token": eos})
    expected = [*([] if bos is False else [1]), 259, *([2] if eos else [])]
    assert tokenizer("a").input_ids == expected
    assert tokenizer("a", "a").input_ids == expected * 2


def test_tokens_in_the_text(imported: Imported, spm: SentencePieceProcessor) -> None:
    """Those of control and of the user are found whole, and what is between is a text of its own."""
    kinds = [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]
    vocabulary = with_added(spm_vocabulary(spm), ["[INST]", "<tool>", "[PAD1202]"], kinds)
    tokenizer = imported(vocabulary)
    ids = tokenizer("[INST] What is it?<tool>x</s> y").input_ids
    between = [spm.encode(text) for text in (" What is it?", "x", " y")]
    assert ids == [1, 1200, *between[0], 1201, *between[1], 2, *between[2]]
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("What is it?<tool> x  y")
    assert len(tokenizer) == 1202  # the unused one is filling
    assert tokenizer.convert_ids_to_tokens([0, 1200, 1201]) == ["<unk>", "[INST]", "<tool>"]


def test_names_of_special_tokens_and_templates(imported: Imported) -> None:
    vocabulary = single_bytes_spm() | {
        "tokenizer.chat_template": "{{ messages[0]['content'] }}!",
        "tokenizer.chat_template.short": "{{ messages[0]['content'][0] }}",
        "tokenizer.chat_templates": ["short"],
        KEY + "padding_token_id": 0,
    }
    tokenizer = imported(vocabulary)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<unk>", "<unk>")
    assert tokenizer.model_max_length == 128
    messages = [{"role": "user", "content": "aaa"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "aaa!"
    assert tokenizer.apply_chat_template(messages, chat_template="short", tokenize=False) == "a"


# A word that no merges lead to: llama.cpp takes it for "llama-bpe" only, as Llama 3's own tokenizer does.
UNREACHED = "Ġgradient"


@pytest.fixture(scope="module")
def learned() -> tuple[list[str], list[str]]:
    """Byte-level tokens in the order of their ids, and merges, learned from documents and the texts here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *TEXTS, "12 123 1234 2345 345\n\n;\n\n" * 9], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [pair for pair in model["merges"] if not "".join(pair).startswith(UNREACHED)]
    tokens = sorted(
        {*model["vocab"], UNREACHED}, key=lambda token: model["vocab"].get(token, len(model["vocab"]))
    )
    return tokens, [" ".join(pair) for pair in merges]


BYTE_LEVEL = [
    ("llama", "smollm", smollm_words, False),
    ("llama", "llama-bpe", llama3_words, True),
    ("llama", "qwen2", qwen2_words, False),
    ("qwen2", "qwen2", qwen2_words, False),
    ("qwen3", "qwen2", qwen2_words, False),
]


@pytest.mark.parametrize(("name", "rule", "words", "whole"), BYTE_LEVEL)
def test_byte_level_ids(
    imported: Imported,
    tmp_path: Path,
    learned: tuple[list[str], list[str]],
    name: str,
    rule: str,
    words: Words,
    whole: bool,
) -> None:
    control = ("<|im_start|>", "<|im_end|>")
    tokenizer = imported(byte_level(*learned, rule, control, ("<tool_call>",)), name)
    expected = ReferenceTokenizer(tmp_path / "model.gguf", words, whole_words=whole)
    for text in [*TEXTS, "<|im_start|>user\n<tool_call>\n{}<|im_end|> a gradient of gradients"]:
        ids = tokenizer(text).input_ids
        assert ids == expected(text), text
        assert tokenizer.decode(ids) == "".join(words(text))
    unreached = expected.ids[UNREACHED]
    assert (unreached in tokenizer(" gradient").input_ids) == whole
    assert tokenizer.decode(expected("<tool_call>x<|im_end|>"), skip_special_tokens=True) == "<tool_call>x"


def test_the_rules_for_words_show(tmp_path: Path, learned: tuple[list[str], list[str]]) -> None:
    """No two rules give the same ids for all texts here, so the comparison above can tell them apart."""
    path = write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"} | byte_level(*learned, "x"), {})
    kinds = {(words, whole) for _, _, words, whole in BYTE_LEVEL} | {(llama3_words, False)}
    references = [ReferenceTokenizer(path, words, whole_words=whole) for words, whole in kinds]
    texts = [*TEXTS, " gradient"]
    ids = [[reference(text) for text in texts] for reference in references]
    assert all(one != other for one, other in combinations(ids, 2))


def test_qwen_without_first_and_filling_tokens(
    imported: Imported, learned: tuple[list[str], list[str]]
) -> None:
    vocabulary = with_added(byte_level(*learned, "qwen2"), ["[PAD1]", "[PAD2]"], [TokenType.UNUSED] * 2)
    tokenizer = imported(vocabulary, "qwen2")
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, "<|endoftext|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == (None, None)
    assert len(tokenizer) == len(learned[0]) + 1
    assert tokenizer("a", add_special_tokens=True).input_ids == tokenizer.encode(
        "a", add_special_tokens=False
    )


@pytest.mark.parametrize(
    ("name", "rule", "told", "added"),
    [
        ("llama", "llama-bpe", None, True),
        ("llama", "llama-bpe", False, False),
        ("llama", "qwen2", None, False),
        ("llama", "smollm", True, True),
        ("qwen2", "qwen2", True, True),
        ("qwen3", "qwen2", True, True),
    ],
)
def test_first_tokens_of_byte_level_texts(
    imported: Imported,
    learned: tuple[list[str], list[str]],
    name: str,
    rule: str,
    told: bool | None,
    added: bool,
) -> None:
    """What the file leaves open is as llama.cpp has it: only Llama 3 begins with a token."""
    vocabulary = byte_level(*learned, rule, ("<|begin_of_text|>", "<|end_of_text|>"))
    first = len(learned[0])
    tokenizer = imported(vocabulary | {KEY + "bos_token_id": first, KEY + "add_bos_token": told}, name)
    begun = [first] * added
    assert tokenizer("a").input_ids == [*begun, *tokenizer.encode("a", add_special_tokens=False)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, r"ggml\.model is 'bert', accepted: \['llama', 'gpt2'\]"),
        ({"model": None}, r"ggml\.model is None, accepted: \['llama', 'gpt2'\]"),
        ({"pre": "tekken"}, r"ggml\.pre is 'tekken', accepted: \[None, 'default'\]"),
        ({"remove_extra_whitespaces": True}, r"whitespaces is True, accepted: \[None, False\]"),
        ({"precompiled_charsmap": [1, 2]}, r"charsmap is \[1, 2\], accepted: \[None\]"),
        (
            {"bos_token_id": None},
            r"bos_token_id is None, accepted: a token, which texts get \(add_bos_token\)",
        ),
        ({"token_type": [9] * 262}, r"token_type is 9, accepted: \[1, 2, 3, 4, 5, 6\]"),
        ({"token_type": [1] * 262}, r"token_type is \[\], accepted: a token for each byte"),
        ({"scores": None}, r"scores is None, accepted: a list of 262 numbers"),
        ({"tokens": None}, r"tokens is None, accepted: a list of strings"),
    ],
)
def test_other_vocabularies_are_refused(
    imported: Imported, tmp_path: Path, changes: Metadata, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        imported(single_bytes_spm() | {KEY + key: value for key, value in changes.items()})
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("tokens", "kinds", "message"),
    [
        (["a"], [TokenType.NORMAL], r"tokens is \['a'\], accepted: tokens that differ"),
        (["aa", "▁▁"], [TokenType.NORMAL] * 2, r"scores is \"-1000\.0 for 2 tokens such as \['aa', '▁▁'\]\""),
        (["ax"], [TokenType.NORMAL], r"tokens is 'ax', accepted: pieces of characters that are tokens"),
        (["aa", "x"], [TokenType.UNUSED, TokenType.NORMAL], r"is \"5 \(unused\) for 'aa'\""),
        (["▁tool"], [TokenType.USER_DEFINED], r"tokens is '▁tool', accepted: user-defined tokens without"),
        (["x"] * ROWS, [TokenType.NORMAL] * ROWS, r"a list of 1862', accepted: at most the embedding's 1600"),
    ],
)
def test_pieces_that_merges_cannot_express_are_refused(
    imported: Imported, tmp_path: Path, tokens: list[str], kinds: list[TokenType], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        imported(with_added(single_bytes_spm(), tokens, kinds))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"pre": "tekken"}, r"pre is 'tekken', accepted: \['smollm', 'llama-bpe', 'qwen2'\]"),
        ("qwen2", {"pre": "deepseek-r1-qwen"}, r"pre is 'deepseek-r1-qwen', accepted: \['qwen2'\]"),
        ("qwen3", {"pre": "deepseek-r1-qwen"}, r"pre is 'deepseek-r1-qwen', accepted: \['smollm'"),
        ("qwen2", {"model": "llama"}, r"ggml\.model is 'llama', accepted: \['gpt2'\]"),
        ("llama", {"pre": None}, r"pre is None, accepted: \['smollm', 'llama-bpe', 'qwen2'\]"),
        ("qwen2", {"pre": "llama-bpe", "bos_token_id": 0}, r"pre is 'llama-bpe', accepted: \['qwen2'\]"),
        ("llama", {"add_space_prefix": True}, r"add_space_prefix is True, accepted: \[None, False\]"),
        ("llama", {"merges": ["a b", "b b"]}, r"merges is 'b b', accepted: two tokens that make a token"),
        ("llama", {"merges": ["ab"]}, r"merges is 'ab', accepted: two tokens that make a token"),
        ("llama", {"merges": None}, r"merges is None, accepted: a list of strings"),
        ("llama", {"add_bos_token": True}, r"bos_token_id is None, accepted: a token, which texts get"),
    ],
)
def test_other_byte_level_vocabularies_are_refused(
    imported: Imported, tmp_path: Path, name: str, changes: Metadata, message: str
) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    vocabulary = byte_level(tokens, ["a b"], "smollm")
    with pytest.raises(ValueError, match=message):
        imported(vocabulary | {KEY + key: value for key, value in changes.items()}, name)
    assert not (tmp_path / "out").exists()
