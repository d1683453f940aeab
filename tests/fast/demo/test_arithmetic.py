"""The arithmetic example: problems whose answers are right, and a checker that is exact."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest

from gapo_mega.demo.arithmetic import MOST_ROWS, last_number, problems, rewards


def test_every_answer_is_right_and_no_problem_comes_twice() -> None:
    rows = problems(MOST_ROWS, seed=3, heldout=100)
    assert len({row["prompt"] for row in rows}) == MOST_ROWS
    assert [row["split"] for row in rows] == ["heldout"] * 100 + ["train"] * (MOST_ROWS - 100)
    # An independent reading of the words: which operation, and which number comes first.
    operations = {
        r"What is (\d+) \+ (\d+)\?|Add (\d+) to (\d+)|has (\d+) pens and buys (\d+)": lambda a, b: a + b,
        r"What is (\d+) - (\d+)\?|has (\d+) eggs and eats (\d+)": lambda a, b: a - b,
        r"Subtract (\d+) from (\d+)": lambda a, b: b - a,
        r"What is (\d+) \* (\d+)\?|Multiply (\d+) by (\d+)|in (\d+) rows of (\d+)": lambda a, b: a * b,
    }
    for row in rows:
        ((found, operation),) = [
            (match, operation)
            for pattern, operation in operations.items()
            if (match := re.search(pattern, str(row["prompt"])))
        ]
        a, b = (int(group) for group in found.groups() if group is not None)
        assert row["answer"] == operation(a, b) >= 0, row


def test_the_seed_decides() -> None:
    assert problems(50, 1, 5) == problems(50, 1, 5) != problems(50, 2, 5)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("no digits, seven", None),
        ("7", "7"),
        ("The answer is 12.", "12"),
        ("3 + 4 = 7", "7"),
        ("It is -5.", "-5"),
        ("It is \u22125", "-5"),
        ("(-5)", "-5"),
        ("+5", "5"),
        ("10-4", "4"),
        ("10 - 4", "4"),
        ("(3)-4", "4"),
        ("1,234", "1234"),
        ("1,234,567.5 pens", "1234567.5"),
        ("3, 4, 5", "5"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("5.", "5"),
        ("5.0", "5"),
        ("2.50", "2.5"),
        ("007", "7"),
        ("7 pens (or 8)", "8"),
        ("**42**", "42"),
        ("x4", "4"),
        ("The sum is ...12", "12"),
        ("12345678901234567890123", "12345678901234567890123"),
    ],
)
def test_the_last_number_is_read_exactly(text: str, number: str | None) -> None:
    found = last_number(text)
    assert found == (None if number is None else Decimal(number))


def test_both_rewards_by_hand() -> None:
    found = rewards(
        ["It is 7.", "It is 8.", "7 or 8", "The answer is 7", "seven"],
        [{"answer": 7}] * 5,
        token_counts=[8, 28, 48, 100, 18],
        finished=[True, True, True, False, True],
    )
    assert found == {"correct": [1.0, 0.0, 0.0, 0.0, 0.0], "brief": [1.0, 0.5, 0.0, 0.0, 0.75]}
