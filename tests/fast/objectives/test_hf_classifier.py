"""Reward models of transformers: scores as theirs one at a time, and what is refused early."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives import Objective, build
from gapo_mega.types import Prompt
from tests.helpers.tiny import tiny_llama

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "user", "assistant", *(f"w{i}" for i in range(26))]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
)
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
PROMPTS = [Prompt(i, " ".join(f"w{(3 * i + k) % 26}" for k in range(1 + 2 * i))) for i in range(7)]
LENGTHS = [12, 3, 9, 1, 14, 5, 0]  # so that conversations differ in length, too
RESPONSES = [" ".join(f"w{(5 * i + k) % 26}" for k in range(n)) for i, n in enumerate(LENGTHS)]


def classifier(directory: Path, config: PreTrainedConfig, template: str | None = TEMPLATE) -> None:
    """A random classifier with a word-level tokenizer whose padding token is its end-of-sequence token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).float().save_pretrained(directory)


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "num_labels": 1, "pad_token_id": None, **fields})


def bert(**fields: Any) -> BertConfig:
    return BertConfig(**{**SIZES, "num_labels": 1, "pad_token_id": 0, **fields})


def objective(directory: Path, **options: Any) -> Objective:
    options = {"model": str(directory), "device": "cpu", **options}
    return build(ObjectiveConfig(name="helpful", kind="hf_classifier", options=options))


def one_at_a_time(directory: Path, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Logits of transformers: no batch, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        text = tokenizer.apply_chat_template(prompt.answered(response), tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            scores.append(model(input_ids=tokens["input_ids"]).logits.item())
    return scores


@pytest.mark.parametrize(
    "config",
    [llama(), llama(pad_token_id=0), llama(pad_token_id=3), bert()],
    ids=["llama, no pad token", "llama, pad", "llama, pads with eos", "bert"],
)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_in_batches_are_those_of_transformers_one_at_a_time(
    tmp_path: Path, config: PreTrainedConfig, batch_size: int
) -> None:
    classifier(tmp_path, config)
    expected = one_at_a_time(tmp_path, PROMPTS, RESPONSES)
    assert len({round(score, 3) for score in expected}) > 3  # the model tells them apart
    scored = objective(tmp_path, batch_size=batch_size)
    # Twice, as a training does; fp32 sums of a few hundred terms.
    for prompts, responses, scores in (
        (PROMPTS, RESPONSES, expected),
        (PROMPTS[::-1], RESPONSES[::-1], expected[::-1]),
    ):
        assert scored.score(prompts, responses) == pytest.approx(scores, rel=1e-5, abs=1e-6)


def test_a_padding_id_that_ends_no_conversation_is_found(tmp_path: Path) -> None:
    """Each conversation ends with another token, the tokenizer's own padding token among them."""
    classifier(tmp_path, llama(), "{{ messages[-1]['content'] }}")
    prompts = PROMPTS[:6]
    responses = ["w0 </s>", "w1 w2 <pad>", "<unk>", "w3 w4 w5 <s>", "w6 w7 w8 w9 user", "</s> w1"]
    scores = objective(tmp_path).score(prompts, responses)
    assert scores == pytest.approx(one_at_a_time(tmp_path, prompts, responses), rel=1e-5, abs=1e-6)


def test_a_padding_id_of_minus_one_counts_as_none(tmp_path: Path) -> None:
    """As old Llama checkpoints have it."""
    classifier(tmp_path, llama())
    expected = one_at_a_time(tmp_path, PROMPTS, RESPONSES)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "pad_token_id": -1}))
    assert objective(tmp_path).score(PROMPTS, RESPONSES) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_sign_turns_costs_into_rewards(tmp_path: Path) -> None:
    classifier(tmp_path, llama())
    rewards = objective(tmp_path).score(PROMPTS, RESPONSES)
    assert objective(tmp_path, sign=-1).score(PROMPTS, RESPONSES) == [-reward for reward in rewards]


def test_bf16_is_close(tmp_path: Path) -> None:
    classifier(tmp_path, llama())
    expected = torch.tensor(one_at_a_time(tmp_path, PROMPTS, RESPONSES))
    found = torch.tensor(objective(tmp_path, dtype="bf16").score(PROMPTS, RESPONSES))
    # 8 bits of mantissa through 2 layers; and not the fp32 result.
    error = (found - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_on_a_gpu_with_and_without_offload(tmp_path: Path, offload: bool) -> None:
    classifier(tmp_path, llama())
    expected = one_at_a_time(tmp_path, PROMPTS, RESPONSES)
    scored = objective(tmp_path, device="auto", offload=offload)
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        assert scored.score(PROMPTS, RESPONSES) == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert (torch.cuda.memory_allocated() > before) != offload


def test_scoring_leaves_the_random_state_alone(tmp_path: Path) -> None:
    """One rank of a replica scores; it must go on with the same random numbers as the others."""
    classifier(tmp_path, bert())
    state = torch.get_rng_state()
    objective(tmp_path).score(PROMPTS, RESPONSES)
    assert torch.equal(torch.get_rng_state(), state)


def test_building_needs_no_weights(tmp_path: Path) -> None:
    classifier(tmp_path, llama())
    (tmp_path / "model.safetensors").unlink()
    scored = objective(tmp_path)
    with pytest.raises(ValueError, match=r"objective 'helpful': options: model: .* one with weights"):
        scored.score(PROMPTS, RESPONSES)


def test_more_or_fewer_logits_than_one_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    classifier(tmp_path, llama(num_labels=2))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"objective 'helpful': options: model: found num_labels 2 in .*: 1 "
    ):
        objective(tmp_path)


def test_a_missing_template_is_refused_and_can_be_given(tmp_path: Path) -> None:
    classifier(tmp_path, llama(), template=None)
    with pytest.raises(ValueError, match=r"objective 'helpful': options: chat_template: not given"):
        objective(tmp_path)
    assert len(objective(tmp_path, chat_template=TEMPLATE).score(PROMPTS, RESPONSES)) == len(PROMPTS)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    classifier(tmp_path, llama())
    tiny_llama(tmp_path, num_labels=1)
    with pytest.raises(ValueError, match=r"model: found LlamaForCausalLM in .*ForSequenceClassification"):
        objective(tmp_path)


@pytest.mark.parametrize("written", [BertForSequenceClassification, LlamaForSequenceClassification])
def test_weights_without_a_head_are_refused(tmp_path: Path, written: type[PreTrainedModel]) -> None:
    """transformers would go on with a random head."""
    config = llama() if written is LlamaForSequenceClassification else bert()
    classifier(tmp_path, config)
    written(config).base_model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": [written.__name__]}))
    with pytest.raises(
        ValueError, match=r"objective 'helpful': options: model: .* lacks \['(score|classifier)"
    ):
        objective(tmp_path).score(PROMPTS, RESPONSES)


def test_only_the_end_of_a_long_conversation_is_scored(tmp_path: Path) -> None:
    classifier(tmp_path, llama(), TEMPLATE.removeprefix("{{ bos_token }}"))
    long, short = Prompt(0, " ".join(["w1"] * 90)), Prompt(1, "w1 w1 w1 w1")
    scored = objective(tmp_path, max_tokens=8)
    first, second = scored.score([long, short], ["w2 w3"] * 2)
    assert first == pytest.approx(second, rel=1e-5)
    assert len(objective(tmp_path).score([long], ["w2 w3"])) == 1  # cut at the model's 64 positions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/nowhere/at/all"}, r"model: found '/nowhere/at/all', accepted: a Hugging Face directory"),
        ({"batch_size": 0}, r"batch_size: found 0, accepted: greater than or equal to 1"),
        ({"device": "gpu"}, r"device: found 'gpu', accepted: auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, r"device: found 'cuda:99', but torch sees \d+ CUDA devices"),
        ({"dtype": "fp8"}, r"dtype: found 'fp8', accepted: 'fp32' or 'bf16'"),
        ({"sign": 2}, r"sign: found 2, accepted: 1 or -1"),
        ({"max_tokens": 65}, r"max_tokens: found 65, accepted: from 1 to 64"),
        ({"offlaod": True}, r"offlaod: unknown key, the nearest is 'offload'"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    classifier(tmp_path, llama())
    with pytest.raises(ValueError, match=rf"^objective 'helpful': options: {message}"):
        objective(tmp_path, **options)


def test_a_function_belongs_to_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objective 'helpful': function: found 'a:b' with kind hf_class"):
        build(ObjectiveConfig(name="helpful", kind="hf_classifier", function="a:b"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": len(WORDS) - 1}, r"model: .* the token 'w25' with the id 31, accepted: 0 to 30"),
        (
            {"pad_token_id": 40, "vocab_size": 41},
            r"model: found pad_token_id 41, accepted: less than the vocab",
        ),
    ],
)
def test_ids_without_a_row_are_refused(tmp_path: Path, fields: dict[str, int], message: str) -> None:
    classifier(tmp_path, llama(**fields))
    if "pad_token_id" in fields:  # transformers would not have written it
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": 41}))
    with pytest.raises(ValueError, match=f"objective 'helpful': options: {message}"):
        objective(tmp_path)
