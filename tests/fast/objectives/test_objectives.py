"""Objectives: python functions, the checks on their results, and the registry."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives import Objective, build, kinds
from gapo_mega.types import Prompt

PROMPTS = [Prompt(i, text) for i, text in enumerate("abc")]
RESPONSES = ["x", "yy", ""]

REWARDS = """
import numpy
import torch

NOT_A_FUNCTION = 3

def length(prompts, responses, *, scale=1.0):
    assert len(prompts) == len(responses)
    return [scale * len(r) for r in responses]

def of_numpy(prompts, responses):
    return numpy.array([len(r) for r in responses], dtype=numpy.float32)

def of_torch(prompts, responses):
    return torch.tensor([float(len(r)) for r in responses])

def of_scalars(prompts, responses):
    return (torch.tensor(float(len(r))) for r in responses)

def of_bools(prompts, responses):
    return [bool(r) for r in responses]

def short(prompts, responses):
    return [1.0]

def none(prompts, responses):
    pass

def text(prompts, responses):
    return ["1.0", "2.0", "3.0"]

def one_text(prompts, responses):
    return "abc"

def nan(prompts, responses):
    return [0.0, float("nan"), 1.0]

def infinite(prompts, responses):
    return numpy.array([0.0, 0.0, -numpy.inf])

def half(prompts, responses):
    return torch.tensor([1.0, 2.0, 1e6]).half()

def bf16(prompts, responses):
    return torch.tensor([1.0, 2.0, 0.0]).bfloat16()

def huge(prompts, responses):
    return [0, 10 ** 400, 0]

def no_score(prompts, responses):
    return [None, 1.0, 2.0]

def mapping(prompts, responses):
    return {0.0: "a", 1.0: "b", 2.0: "c"}

def unordered(prompts, responses):
    return {1.0, 2.0, 3.0}

def codes(prompts, responses):
    return bytearray(b"123")

def complex_number(prompts, responses):
    return [1j, 0.0, 0.0]

def matrix(prompts, responses):
    return numpy.zeros((3, 2))

def fails(prompts, responses):
    raise KeyError("inside the function")

def changes_its_input(prompts, responses):
    prompts.clear()
    return [0.0 for _ in responses]
"""


@pytest.fixture(autouse=True)
def rewards_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "trial_rewards.py").write_text(REWARDS)
    (tmp_path / "broken_rewards.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("trial_rewards", "broken_rewards"):
        sys.modules.pop(name, None)


def objective(function: str | None, **fields: Any) -> Objective:
    return build(ObjectiveConfig(name="brevity", function=function, **fields))


@pytest.mark.parametrize("function", ["length", "of_numpy", "of_torch", "of_scalars", "bf16"])
def test_scores_of_every_usual_result_type_become_floats(function: str) -> None:
    trial = objective(f"trial_rewards:{function}")
    scores = trial.score(PROMPTS, RESPONSES)
    assert trial.name == "brevity"
    assert scores == [1.0, 2.0, 0.0]
    assert all(type(score) is float for score in scores)


def test_bools_count_as_zero_and_one() -> None:
    assert objective("trial_rewards:of_bools").score(PROMPTS, RESPONSES) == [1.0, 1.0, 0.0]


def test_options_are_keyword_arguments_and_clip_is_applied_afterwards() -> None:
    trial = objective("trial_rewards:length", options={"scale": -10.0}, clip=15.0)
    assert trial.score(PROMPTS, RESPONSES) == [-10.0, -15.0, 0.0]


def test_nothing_to_score_gives_nothing() -> None:
    assert objective("trial_rewards:short").score([], []) == []


def test_the_function_cannot_change_the_callers_lists() -> None:
    prompts = list(PROMPTS)
    objective("trial_rewards:changes_its_input").score(prompts, RESPONSES)
    assert prompts == PROMPTS


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", r"found 1 scores, accepted: 3"),
        ("none", r"result of type NoneType"),
        ("text", r"score '1.0' for response 0"),
        ("one_text", r"result of type str"),
        ("nan", r"score nan for response 1, accepted: a finite number"),
        ("infinite", r"score -inf for response 2"),
        ("matrix", r"score \[0.0, 0.0\] for response 0"),
        ("half", r"score inf for response 2"),
        ("huge", r"score 10+ for response 1, accepted: a finite number"),
        ("no_score", r"score None for response 0"),
        ("mapping", r"result of type dict, accepted: a list"),
        ("unordered", r"result of type set, accepted: a list"),
        ("codes", r"result of type bytearray, accepted: a list"),
        ("complex_number", r"score 1j for response 0"),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])  # clipping must not hide an infinite score
def test_bad_results_name_objective_index_and_value(function: str, message: str, clip: float | None) -> None:
    with pytest.raises(ValueError, match=rf"objective 'brevity': .*({message})"):
        objective(f"trial_rewards:{function}", clip=clip).score(PROMPTS, RESPONSES)


def test_an_error_inside_the_function_is_not_hidden() -> None:
    line = r"^objective 'brevity': .*trial_rewards\.py, line \d+: KeyError: 'inside the function'$"
    with pytest.raises(ValueError, match=line) as raised:
        objective("trial_rewards:fails").score(PROMPTS, RESPONSES)
    assert isinstance(raised.value.__cause__, KeyError)  # what GAPO_MEGA_TRACEBACK shows


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, r"function: found None, accepted: 'module:function'"),
        ("trial_rewards.length", r"function: found 'trial_rewards.length'"),
        ("trial_rewards:", r"function: found 'trial_rewards:'"),
        ("no_such_module:f", r"module 'no_such_module', which Python does not find.*PYTHONPATH"),
        ("trial_rewards.inner:f", r"module 'trial_rewards.inner', which Python does not find"),
        ("trial_rewards:lenght", r"'trial_rewards' has no 'lenght' \(did you mean 'length'\?\)"),
        ("trial_rewards:NOT_A_FUNCTION", r"of type int, accepted: a function"),
    ],
)
def test_bad_function_names_are_refused_when_built(function: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=rf"objective 'brevity': .*({message})"):
        objective(function)


def test_a_missing_import_inside_the_module_is_reported_as_itself() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        objective("broken_rewards:f")


def test_bad_options_are_refused_when_built() -> None:
    with pytest.raises(
        ValueError, match=r"options: .*'scael'.*signature is \(prompts, responses, \*, scale=1.0\)"
    ):
        objective("trial_rewards:length", options={"scael": 2.0})


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'brevity': kind: found 'pyton' \(did you mean 'python'\?\)"):
        objective("trial_rewards:length", kind="pyton")


def test_a_function_without_a_readable_signature_is_no_obstacle() -> None:
    with pytest.raises(ValueError, match="no signature found"):
        inspect.signature(max)
    assert objective("builtins:max").name == "brevity"


@pytest.mark.every("objectives")
def test_a_kind_scores_or_refuses_an_empty_configuration(name: str) -> None:
    try:
        trial = build(ObjectiveConfig(name="brevity", kind=name))
    except ValueError as error:
        assert "brevity" in str(error)
        return
    assert trial.name == "brevity"
    if trial.wanted_model is None:
        scores = trial.score(PROMPTS, RESPONSES)
        assert len(scores) == len(RESPONSES) and all(math.isfinite(score) for score in scores)
    assert trial.score([], []) == []


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_kind_of_the_folder_refuses_an_empty_configuration_with_a_clear_error(kind: str) -> None:
    with pytest.raises(ValueError, match="brevity"):
        build(ObjectiveConfig(name="brevity", kind=kind))


def test_text_without_utf_8_is_refused_by_every_kind_before_it_is_scored() -> None:
    scored = objective("trial_rewards:length")
    with pytest.raises(
        ValueError, match=r"found '\\udc80' at character 2 of the response 1, accepted: text without"
    ):
        scored.score([Prompt(0, "a"), Prompt(1, "b")], ["x", "ab\udc80"])
