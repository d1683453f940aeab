"""What reward functions get by the names of their parameters, and what they may give."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives import Objective, build, build_all
from gapo_mega.types import Prompt, ResponseFacts

ASKED = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"})
PROMPTS = [
    Prompt(0, "a", columns={"answer": 1, "tags": ["x"], "kept by another": 0}),
    Prompt(1, "b", messages=(*ASKED, {"role": "user", "content": "b"}), columns={"answer": None, "tags": []}),
]
RESPONSES = ["one", "three"]
FACTS = ResponseFacts([4, 6], [True, False])

REWARDS = """
seen = []
calls = []

def everything(prompts, responses, columns, messages, token_counts, finished, scale=1.0):
    seen.append(dict(locals()))
    return [scale * n for n in token_counts]

def by_name(*, finished, columns, responses):
    seen.append(dict(locals()))
    return [float(f) for f in finished]

def any_names(p, r, *, finished):
    seen.append(dict(locals()))
    return [float(f) for f in finished]

def positional_only(prompts, responses, /, columns):
    seen.append(dict(locals()))
    return [0.0] * len(responses)

def variadic(*both, columns):
    seen.append(dict(locals()))
    return [0.0] * 2

def one_argument(responses, scale=2.0):
    return [scale * len(r) for r in responses]

def swapped(responses, prompts):
    return [len(r) - len(p) for p, r in zip(prompts, responses)]

def two_of_any_name(prompts, r):
    return [len(text) for text in r]

def with_default(prompts, responses, columns=None):
    return [0.0 if columns is None else 1.0 for _ in responses]

def option_of_that_name(prompts, responses, finished=0.5):
    return [finished for _ in responses]

def mixed_up(text, columns):
    return [0.0, 0.0]

def single(prompt, response, columns, messages, token_count, finished, scale=1.0):
    seen.append(dict(locals()))
    return scale * token_count

def single_text(p, r):
    return len(r)

def single_bad(prompt, response):
    return 1.0 if response == "one" else None

def changes(columns):
    for row in columns:
        row["tags"].append("changed")
        row.clear()
    return [0.0 for _ in columns]

def both(prompts, responses):
    calls.append(list(responses))
    return {"long": [len(r) for r in responses], "short": (-len(r) for r in responses), "spare": []}

def rows(responses):
    calls.append(list(responses))
    return ({"long": len(r), "short": -len(r)} for r in responses)

def single_both(response):
    calls.append(response)
    return {"long": len(response), "short": -len(response)}

def single_half(response):
    return {"long": 1.0} if response == "one" else {}
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "asking_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("asking_rewards", None)


def config(function: str, **fields: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(
        {"name": "trial", "function": f"asking_rewards:{function}", **fields}
    )


def objective(function: str, **fields: Any) -> Objective:
    return build(config(function, **fields))


def score(function: str, facts: ResponseFacts | None = FACTS, **fields: Any) -> list[float]:
    return objective(function, **fields).score(PROMPTS, RESPONSES, facts)


def seen() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = sys.modules["asking_rewards"].seen  # type: ignore[attr-defined]
    return found


def calls() -> list[Any]:
    found: list[Any] = sys.modules["asking_rewards"].calls  # type: ignore[attr-defined]
    return found


CONVERSATIONS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}],
    [*ASKED, {"role": "user", "content": "b"}, {"role": "assistant", "content": "three"}],
]


def test_a_function_gets_all_that_its_parameters_name() -> None:
    assert score("everything", columns=["answer", "tags"], options={"scale": 10.0}) == [40.0, 60.0]
    assert seen() == [
        {
            "prompts": ["a", "b"],
            "responses": RESPONSES,
            "columns": [{"answer": 1, "tags": ["x"]}, {"answer": None, "tags": []}],
            "messages": CONVERSATIONS,
            "token_counts": [4, 6],
            "finished": [True, False],
            "scale": 10.0,
        }
    ]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            "by_name",
            {"responses": RESPONSES, "finished": [True, False], "columns": [{"answer": 1}, {"answer": None}]},
        ),
        ("positional_only", {"prompts": ["a", "b"], "responses": RESPONSES}),
        ("variadic", {"both": (["a", "b"], RESPONSES)}),
    ],
)
def test_by_name_and_by_position(function: str, expected: dict[str, Any]) -> None:
    score(function, columns=["answer"])
    assert expected.items() <= seen()[0].items()
    assert seen()[0]["columns"] == [{"answer": 1}, {"answer": None}]


def test_two_first_parameters_of_any_name_are_prompts_and_responses() -> None:
    assert score("any_names") == [1.0, 0.0]
    assert (seen()[0]["p"], seen()[0]["r"]) == (["a", "b"], RESPONSES)
    assert score("two_of_any_name", facts=None) == [3.0, 5.0]


def test_names_count_and_not_places() -> None:
    assert score("swapped") == [2.0, 4.0]
    assert score("one_argument", facts=None) == [6.0, 10.0]
    assert score("one_argument", options={"scale": 1}) == [3.0, 5.0]


def test_a_parameter_with_a_default_is_given_what_is_there() -> None:
    assert score("with_default") == [0.0, 0.0]
    assert score("with_default", columns=["answer"]) == [1.0, 1.0]
    assert score("option_of_that_name", options={"finished": 0.25}) == [0.25, 0.25]


def test_a_function_of_single_samples() -> None:
    found = score("single", columns=["answer"], per_sample=True, options={"scale": 0.5})
    assert found == [2.0, 3.0]
    assert [(s["prompt"], s["response"], s["columns"], s["messages"], s["finished"]) for s in seen()] == [
        ("a", "one", {"answer": 1}, CONVERSATIONS[0], True),
        ("b", "three", {"answer": None}, CONVERSATIONS[1], False),
    ]
    assert score("single_text", per_sample=True, clip=4.0) == [3.0, 4.0]
    with pytest.raises(ValueError, match="objective 'trial': found the score None for response 1, accepted"):
        score("single_bad", per_sample=True)


def test_a_function_cannot_change_the_rows() -> None:
    assert score("changes", columns=["tags"]) == [0.0, 0.0]
    assert PROMPTS[0].columns["tags"] == ["x"]


@pytest.mark.parametrize(
    ("function", "per_sample", "evaluations"),
    [
        ("both", False, [RESPONSES]),
        ("rows", False, [RESPONSES]),
        ("single_both", True, RESPONSES),
    ],
)
def test_one_call_serves_the_objectives_of_a_mapping(
    function: str, per_sample: bool, evaluations: list[Any]
) -> None:
    entry = config(function, per_sample=per_sample, name=None, outputs=["short", "long"], clip=4.0)
    short, long = build_all(entry.split())
    assert (short.name, long.name) == ("short", "long")
    assert long.score(PROMPTS, RESPONSES) == [3.0, 4.0]
    assert short.score(PROMPTS, RESPONSES) == [-3.0, -4.0]
    assert calls() == evaluations
    # Other responses, or the same once more: never an old result.
    others = ["", "x"]
    assert short.score(PROMPTS, others) == [0.0, -1.0]
    assert short.score(PROMPTS, others) == [0.0, -1.0]
    assert long.score(PROMPTS, others) == [0.0, 1.0]
    assert len(calls()) == 3 * len(evaluations)


def test_objectives_of_other_options_do_not_share_a_call() -> None:
    entry = config("both", name=None, outputs=["long"])
    other = config("both", name="other", output="long", per_sample=False, columns=[])
    third = config("rows", name="third", output="long")
    for each in build_all([*entry.split(), other, third]):
        each.score(PROMPTS, RESPONSES)
    assert len(calls()) == 2  # both, and rows


@pytest.mark.parametrize(
    ("function", "fields", "message"),
    [
        ("everything", {}, r"columns: found none, but the function asks for columns; accepted: names of"),
        ("two_of_any_name", {"columns": ["answer"]}, r"columns: found \['answer'\], but .* no para"),
        (
            "mixed_up",
            {"columns": ["answer"]},
            r"function: found the parameters text and columns, accepted: all",
        ),
        ("single", {"columns": ["answer"]}, r"options: missing a required .*; the function is called as"),
        ("everything", {"per_sample": True, "columns": ["answer"]}, r"options: "),
        (
            "one_argument",
            {"options": {"scael": 1}},
            r"options: .*'scael'.*called as \(responses, \*\*options\)",
        ),
        ("length", {}, r".* has no 'length'"),
    ],
)
def test_what_cannot_be_called_is_refused_when_built(
    function: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^objective 'trial': ({message})"):
        objective(function, **fields)


@pytest.mark.parametrize(
    ("function", "fields", "message"),
    [
        ("two_of_any_name", {"output": "long"}, r"found the result for response 0 of type int"),
        ("both", {"output": "lnog"}, r"found the result with 'long', 'short', 'spare', accepted: .* 'lnog'"),
        ("both", {"output": "spare"}, r"found 0 scores, accepted: 2"),
        (
            "both",
            {},
            r"found a result of type dict, accepted: a list of scores \(outputs makes objectives of",
        ),
        (
            "single_half",
            {"output": "long", "per_sample": True},
            r"found the result for response 1 with no names",
        ),
        ("single_both", {"per_sample": True}, r"found the score {'long': 3, 'short': -3} for response 0"),
        (
            "everything",
            {"columns": ["reply"]},
            r"columns: found answer, kept by another, tags with .* response 0",
        ),
    ],
)
def test_bad_results_are_named(function: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^objective 'trial': {message}"):
        score(function, **fields)


def test_without_facts_a_function_that_asks_for_them_is_refused() -> None:
    trial = objective("by_name", columns=["answer"])
    assert trial.reads_facts and not objective("both").reads_facts
    with pytest.raises(ValueError, match="found no token_counts and finished, which the function asks for"):
        trial.score(PROMPTS, RESPONSES)


@pytest.mark.parametrize("kind", ["http", "hf_classifier", "megatron_score"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_sample": True}, "per_sample: found true"),
        ({"output": "a"}, "outputs: found a with kind"),
        ({"columns": ["answer"]}, "columns: found"),
    ],
)
def test_other_kinds_refuse_what_they_do_not_read(kind: str, fields: dict[str, Any], message: str) -> None:
    if kind == "http" and "columns" in fields:
        message = "options: url: not given"  # it sends columns
    with pytest.raises(ValueError, match=f"objective 'trial': {message}"):
        build(ObjectiveConfig.model_validate({"name": "trial", "kind": kind, **fields}))
