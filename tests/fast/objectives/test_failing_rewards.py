"""What the user's code raises while it scores: objective, file and line, in one line, whatever it is."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives import build, build_all
from gapo_mega.objectives.base import RewardFailed
from gapo_mega.types import Prompt

PROMPTS = [Prompt(0, "a"), Prompt(1, "b")]
RESPONSES = ["one", "two"]

# Every function fails in a line that says FAILS.
CODE = '''
import itertools, json, statistics, sys
from collections import Counter, UserDict

from gapo_mega.objectives.base import ObjectiveKind

class TwoArguments(Exception):
    """Cannot be read back from a pickle."""
    def __init__(self, a, b):
        super().__init__(a)

class NoText(Exception):
    def __str__(self):
        raise TypeError("no text")

class OfItsOwn(BaseException):
    pass

class Number:
    def __float__(self):
        raise LookupError("no number")  # FAILS

class NoRepr(list):
    def __repr__(self):
        raise ValueError("no repr")

def value(p, r):
    raise ValueError("found\\n  something")  # FAILS

def other(p, r):
    return [{}["answer"] for _ in r]  # FAILS

def deeper(p, r):
    return helper(r)

def helper(r):
    return statistics.mean([])  # FAILS

def leaves(p, r):
    sys.exit(0)  # FAILS

def leaves_with_words(p, r):
    sys.exit("bye")  # FAILS

def unpicklable(p, r):
    raise TwoArguments("lost", 2)  # FAILS

def without_text(p, r):
    raise NoText  # FAILS

def of_its_own(p, r):
    raise OfItsOwn("gone")  # FAILS

def in_a_library(p, r):
    return [json.loads("{") for _ in r]  # FAILS

def lazily(p, r):
    yield 1.0
    raise RuntimeError("late")  # FAILS

def in_a_number(p, r):
    return [Number(), 1.0]

def named_lazily(p, r):
    return {"a": lazily(p, r), "b": [1.0, 2.0]}

def recursion(p, r):
    return recursion(p, r)  # FAILS

def dictionary(p, r):
    return dict(zip(r, [1.0, 2.0]))

def counter(p, r):
    return Counter(r)

def mapping(p, r):
    return UserDict(zip(r, [1.0, 2.0]))

def keys(p, r):
    return {1.0: "a", 2.0: "b"}.keys()

def a_set(p, r):
    return {1.0, 2.0}

def a_frozenset(p, r):
    return frozenset({1.0, 2.0})

def dictionaries(p, r):
    return [{"score": 1.0}, {"score": 2.0}]

def a_set_among_them(p, r):
    return [1.0, {2.0}]

def huge(p, r):
    return [1.0, 10**400]

def beyond_text(p, r):
    return [1.0, 10**5000]

def no_repr(p, r):
    return [1.0, NoRepr()]

def endless(p, r):
    return itertools.count()

class Kind(ObjectiveKind):
    def evaluate(self, prompts, responses):
        return [int(text) for text in responses]  # FAILS

class Prefixed(ObjectiveKind):
    def evaluate(self, prompts, responses):
        raise ValueError(f"objective {self.name!r}: found nothing")  # FAILS

class Ours(ObjectiveKind):
    def evaluate(self, prompts, responses):
        raise self._error("found nothing")
'''
LINES = CODE.splitlines()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "failing_rewards.py"
    path.write_text(CODE)
    return path


def failure(file: Path, **fields: Any) -> ValueError:
    scored = build(ObjectiveConfig.model_validate({"name": "mine", **fields}))
    with pytest.raises(ValueError) as raised:
        scored.score(PROMPTS, RESPONSES)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 800
    return raised.value


def check_place(error: ValueError, file: Path, reason: str) -> None:
    found = re.fullmatch(rf"objective 'mine': {re.escape(str(file))}, line (\d+): {reason}", str(error))
    assert found is not None, error
    assert LINES[int(found[1]) - 1].endswith("# FAILS")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("value", "found something"),
        ("other", "KeyError: 'answer'"),
        ("deeper", "StatisticsError: mean requires at least one data point"),
        ("leaves", r"found sys\.exit\(0\), accepted: code that returns or raises"),
        ("leaves_with_words", r"found sys\.exit\('bye'\), accepted: code that returns or raises"),
        ("unpicklable", "TwoArguments: lost"),
        ("without_text", r"NoText: its text cannot be made \(TypeError\)"),
        ("of_its_own", "OfItsOwn: gone"),
        ("in_a_library", "JSONDecodeError: Expecting property name.*"),
        ("lazily", "RuntimeError: late"),
        ("in_a_number", "LookupError: no number"),
        ("recursion", "RecursionError: maximum recursion depth exceeded.*"),
    ],
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_whatever_is_raised_is_named(file: Path, function: str, reason: str, per_sample: bool) -> None:
    if per_sample and function in ("lazily", "in_a_number"):
        pytest.skip("gives a list")
    error = failure(file, function=f"{file}:{function}", per_sample=per_sample)
    check_place(error, file, reason)
    assert isinstance(error, RewardFailed)
    assert error.refused == (function in ("value", "deeper", "in_a_library"))  # those are ValueErrors
    copy = pickle.loads(pickle.dumps(error))  # as it reaches the other ranks
    assert (str(copy), copy.reason, copy.refused) == (str(error), error.reason, error.refused)


def test_a_part_of_a_mapping_that_fails_late_is_named(file: Path) -> None:
    configs = [
        ObjectiveConfig(name=name, function=f"{file}:named_lazily", output=name) for name in ("a", "b")
    ]
    a, b = build_all(configs)
    with pytest.raises(
        RewardFailed, match=r"^objective 'a': .*failing_rewards\.py, line \d+: RuntimeError: late"
    ):
        a.score(PROMPTS, RESPONSES)
    assert b.score(PROMPTS, RESPONSES) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("kind", "reason"), [("Kind", "invalid literal for int.*"), ("Prefixed", "found nothing")]
)
def test_a_kind_of_the_users_own_is_named_likewise(file: Path, kind: str, reason: str) -> None:
    check_place(failure(file, kind=f"{file}:{kind}"), file, reason)


def test_what_a_kind_refuses_by_itself_stays_as_it_is(file: Path) -> None:
    assert str(failure(file, kind=f"{file}:Ours")) == "objective 'mine': found nothing"


def test_an_interrupt_is_no_failure_of_the_reward(tmp_path: Path) -> None:
    path = tmp_path / "interrupted.py"
    path.write_text("def stopped(p, r):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        build(ObjectiveConfig(name="mine", function=f"{path}:stopped")).score(PROMPTS, RESPONSES)


def test_a_file_that_ends_the_process_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys\n\ndef f(p, r):\n    return [0.0]\n\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"function: .*script\.py, line 6: found sys\.exit\(0\), accepted"):
        build(ObjectiveConfig(name="mine", function=f"{path}:f"))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        ("dictionary", "a result of type dict"),
        ("counter", "a result of type Counter"),
        ("mapping", "a result of type UserDict"),
        ("keys", "a result of type dict_keys"),
        ("a_set", "a result of type set"),
        ("a_frozenset", "a result of type frozenset"),
        ("dictionaries", "the score {'score': 1.0} for response 0, of type dict"),
        ("a_set_among_them", "the score {2.0} for response 1, of type set"),
        ("huge", f"the score 1{'0' * 400} for response 1"),
        ("beyond_text", "the score a value of type int that cannot be shown (ValueError) for response 1"),
        ("no_repr", "the score a value of type NoRepr that cannot be shown (ValueError) for response 1"),
        ("endless", "more than 2 scores"),
    ],
)
def test_what_is_no_list_of_scores_is_refused_with_its_type(file: Path, function: str, found: str) -> None:
    error = str(failure(file, function=f"{file}:{function}"))
    assert error.startswith(f"objective 'mine': found {found}, accepted: "), error


def test_a_score_of_any_size_is_told_in_one_line_where_scores_are_checked_last() -> None:
    from gapo_mega.rollout.response_scores import _checked

    scores: Sequence[Any] = [0.0, 10**5000]
    with pytest.raises(ValueError, match=r"^objective 'a': found the score a value of type int that"):
        _checked("a", scores, PROMPTS)
