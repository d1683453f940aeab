"""Evaluations in this process, against transformers and against themselves."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gapo_mega.config import Config, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import convert
from gapo_mega.evaluation.answers import read_answers, write_answers
from gapo_mega.evaluation.comparison import Comparison
from gapo_mega.evaluation.intervals import Resampling
from gapo_mega.runs import processes
from gapo_mega.runs.evaluate import Evaluation, Request
from gapo_mega.runs.evaluated_models import find_models
from gapo_mega.whereabouts import START, enter
from tests.helpers import rewards
from tests.helpers.hf_directories import classifier
from tests.helpers.perturbed import perturbed
from tests.helpers.rewards import short, vowels
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

PROMPTS = [f"What is {i} plus {7 * i}?" for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    tiny_llama(folder / "base", vocab=101)
    byte_tokenizer(folder / "base", CHAT_TEMPLATE)
    perturbed(folder / "base", folder / "tuned", seed=1)
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text(lines)
    return folder


def configuration(folder: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "output_dir": str(folder / "run"),
            "model": {"path": "unused"},
            "data": {"source": "unused", "max_prompt_tokens": 80},
            "rollout": {"max_new_tokens": 6, "temperature": 0.7, "batch_size": 4},
            "evaluation": {"samples_per_prompt": 2},
            "objectives": [
                {"name": "short", "function": "tests.helpers.rewards:short"},
                {"name": "vowels", "function": "tests.helpers.rewards:vowels"},
            ],
            **sections,
        }
    )


def request(folder: Path, out: Path, *models: str, **changes: Any) -> Request:
    named = find_models([str(folder / model) for model in models or ("base", "tuned")])
    settings = Request(
        models=named,
        reference=named[0],
        out=out,
        refusals=("gcg", ["Sorry"]),
        prompts=str(folder / "prompts.jsonl"),
        how=Resampling(resamples=200),
    )
    return replace(settings, **changes)


def evaluated(config: Config, wanted: Request) -> tuple[Comparison, Evaluation]:
    """The results, and what made them."""
    evaluation = Evaluation(config, wanted)
    comparison = evaluation.run()
    assert comparison is not None
    return comparison, evaluation


def log_probability(model: Any, prompt: list[int], response: list[int], temperature: float) -> float:
    """Of a response, in float64."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + response])).logits[0] / temperature
    logprobs_TV = logits_TV.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return float(logprobs_TV[range(len(response)), response].sum())


def test_scores_and_divergence_are_those_of_the_responses(folder: Path, tmp_path: Path) -> None:
    comparison, evaluation = evaluated(configuration(folder), request(folder, tmp_path / "out"))
    base, tuned = (read_answers(tmp_path / "out" / name / "responses.jsonl") for name in ("base", "tuned"))
    assert [(a.number, a.sample, a.prompt) for a in tuned] == [
        (i, k, prompt) for i, prompt in enumerate(PROMPTS) for k in range(2)
    ]
    assert {answer.kl for answer in base} == {0.0}
    texts, responses = [a.prompt for a in tuned], [a.response for a in tuned]
    for name, function in (("short", short), ("vowels", vowels)):
        expected = function(texts, responses)
        assert [answer.scores[name] for answer in tuned] == pytest.approx(expected, rel=1e-6)  # of float32
        found = comparison.models[1].estimates[f"objective/{name}"].mean
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    # Where no token is lost in decoding, transformers reads the same response.
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name).double().eval() for name in ("tuned", "base")
    ]
    compared = 0
    for answer, prompt in zip(
        tuned, [p for p in evaluation._candidates[0].prompts for _ in range(2)], strict=True
    ):
        response = tokenizer.encode(answer.response, add_special_tokens=False)
        if len(response) != answer.tokens or answer.finished:
            continue
        tuned_nats, base_nats = (
            log_probability(model, list(prompt.token_ids), response, 0.7) for model in models
        )
        assert answer.kl == pytest.approx(tuned_nats - base_nats, abs=1e-4)  # six logits of float32
        compared += 1
    assert compared >= 3


def test_packed_rows_and_logits_in_chunks_say_the_same(folder: Path, tmp_path: Path) -> None:
    """Divergences, which passes over whole sequences measure; responses are bit for bit alike."""
    packed = {"micro_batch_tokens": 100, "model": {"path": "unused", "logits_chunk": 3}}
    found = []
    for name, sections in (("plain", {}), ("packed", packed)):
        evaluated(configuration(folder, **sections), request(folder, tmp_path / name))
        found.append(read_answers(tmp_path / name / "tuned" / "responses.jsonl"))
    assert [answer.response for answer in found[0]] == [answer.response for answer in found[1]]
    # Sums of six differences of fp32 log-probabilities.
    expected = [answer.kl for answer in found[0]]
    assert [answer.kl for answer in found[1]] == pytest.approx(expected, abs=1e-5)
    assert max(abs(kl) for kl in expected) > 1e-3


def test_it_goes_on_where_it_was_killed(folder: Path, tmp_path: Path) -> None:
    evaluated(configuration(folder), request(folder, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    path = tmp_path / "killed" / "tuned" / "responses.jsonl"
    path.write_bytes(path.read_bytes()[:-700])  # in the second of three batches
    marked = [replace(answer, response="kept") for answer in read_answers(path)[:4]]
    write_answers(path, [*marked, *read_answers(path)[4:]])
    evaluated(configuration(folder), request(folder, tmp_path / "killed"))
    expected = read_answers(tmp_path / "whole" / "tuned" / "responses.jsonl")
    assert read_answers(path) == [*marked, *expected[4:]]


def test_what_is_there_needs_no_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = request(folder, tmp_path / "out", "base")
    first, _ = evaluated(configuration(folder), wanted)
    monkeypatch.setattr("gapo_mega.runs.evaluate.build_answering_engine", None)
    again, _ = evaluated(configuration(folder), wanted)
    assert again == first


def test_a_reward_that_hangs_ends_the_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until the process is told to end, which a patched end does not do."""
    said: list[str] = []
    ended = threading.Event()

    def end(message: str) -> None:
        said.append(message)
        ended.set()

    def hanging(prompts: list[str], responses: list[str]) -> list[float]:
        assert ended.wait(60)
        return short(prompts, responses)

    monkeypatch.setattr(processes, "end_process", end)
    monkeypatch.setattr(rewards, "short", hanging)
    monkeypatch.setattr(ParallelConfig, "phase", timedelta(seconds=2))
    enter(START)
    evaluated(configuration(folder), request(folder, tmp_path / "out", "base"))
    assert "has been in answering since" in said[0] and "(parallel.phase_minutes)" in said[0]


def test_a_judge_is_added_to_what_is_there(folder: Path, tmp_path: Path) -> None:
    judges = configuration(folder).objectives
    evaluated(configuration(folder, objectives=judges[:1]), request(folder, tmp_path / "out", "base"))
    path = tmp_path / "out" / "base" / "responses.jsonl"
    before = read_answers(path)
    evaluated(configuration(folder), request(folder, tmp_path / "out", "base"))
    scores = vowels([a.prompt for a in before], [a.response for a in before])
    for old, new, score in zip(before, read_answers(path), scores, strict=True):
        assert new.scores["vowels"] == pytest.approx(score, rel=1e-6)  # of float32
        assert replace(new, scores=old.scores) == old


def test_a_checkpoint_answers_as_its_directory(folder: Path, tmp_path: Path) -> None:
    convert.to_checkpoint(folder / "tuned", tmp_path / "checkpoint")
    wanted = request(folder, tmp_path / "out", "base", "tuned", str(tmp_path / "checkpoint"))
    evaluated(configuration(folder), wanted)
    found = [read_answers(tmp_path / "out" / name / "responses.jsonl") for name in ("tuned", "checkpoint")]
    assert found[0] == found[1]
    assert found[0] != read_answers(tmp_path / "out" / "base" / "responses.jsonl")


def score_model(directory: Path) -> Path:
    """A model with one score a text, that has learned nothing, and its tokenizer."""
    classifier(directory)
    byte_tokenizer(directory, CHAT_TEMPLATE)
    return directory


def score_of(directory: Path, prompt: str, response: str) -> float:
    """By transformers, at the last token of the conversation."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory).double().eval()
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model.score(model.model(ids).last_hidden_state[0, -1]))


def test_a_score_model_in_the_engine_scores_every_model_s_responses(folder: Path, tmp_path: Path) -> None:
    """It stays when the engine goes on to the next model."""
    judge = score_model(tmp_path / "judge")
    liked = {"name": "liked", "kind": "megatron_score", "options": {"model": str(judge)}}
    short_too = {"name": "short", "function": "tests.helpers.rewards:short"}
    config = configuration(folder, objectives=[liked, short_too])
    evaluated(config, request(folder, tmp_path / "out"))
    for name in ("base", "tuned"):
        for answer in read_answers(tmp_path / "out" / name / "responses.jsonl"):
            expected = score_of(judge, answer.prompt, answer.response)
            assert answer.scores["liked"] == pytest.approx(expected, rel=1e-4, abs=1e-5)  # fp32, four layers


def test_greedy_responses_have_no_divergence(folder: Path, tmp_path: Path) -> None:
    comparison, _ = evaluated(configuration(folder), request(folder, tmp_path / "out", greedy=True))
    assert "kl" not in comparison.measures
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Reference:" not in page and "6 prompts, 2 responses to each" in page
    answers = read_answers(tmp_path / "out" / "tuned" / "responses.jsonl")
    assert [a.response for a in answers[::2]] == [a.response for a in answers[1::2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"source": "unused", "max_prompt_tokens": 9000}},
            r"^--model .*base: data.max_prompt_tokens",
        ),
        ({"parallel": {"tensor": 2}}, r"^--model .*base: parallel"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_model(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(configuration(folder, **changes), request(folder, tmp_path / "out"))


def test_an_unknown_threshold_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--threshold: found 'kind', accepted: short, vowels$"):
        Evaluation(configuration(folder), request(folder, tmp_path / "out", thresholds={"kind": 0.0}))
