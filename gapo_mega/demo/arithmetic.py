"""Arithmetic whose answers are known: a script that makes prompts, and the reward that checks them.

``python -m gapo_mega.demo.arithmetic OUT.jsonl --count 512 --seed 1`` writes prompts with their ``answer``;
``rewards`` gives two objectives from one function: ``correct``, an exact check of the last number of a
response, and ``brief``. They pull apart where working a sum out in words makes it right.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from gapo_mega.files import local

LARGEST = 20  # number in a sum or a difference
LARGEST_FACTOR = 12
MOST_ROWS = 2000

_OPERATIONS = {
    "+": (
        "What is {a} + {b}?",
        "Add {b} to {a}.",
        "Tom has {a} pens and buys {b}. How many has he now?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Subtract {b} from {a}.",
        "Ann has {a} eggs and eats {b}. What is left?",
    ),
    "*": ("What is {a} * {b}?", "Multiply {a} by {b}.", "How many seats are there in {a} rows of {b}?"),
}
# A sign belongs to a number unless it follows one, as in 7-4; commas stand between groups of three digits.
_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)(?:(?<![\w)])[-+−])?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?")


def problems(count: int, seed: int, heldout: int) -> list[dict[str, str | int]]:
    """``count`` different problems in an order that depends on ``seed``; the first ``heldout`` are held out.

    Raises ``ValueError`` for more than ``MOST_ROWS``, or for more held-out ones than all.
    """
    if not 1 <= count <= MOST_ROWS:
        raise ValueError(f"--count: found {count}, accepted: 1 to {MOST_ROWS}")
    if not 0 <= heldout < count:
        raise ValueError(f"--heldout: found {heldout}, accepted: 0 to {count - 1}, fewer than --count")
    draw = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < count:
        sign = draw.choice(list(_OPERATIONS))
        largest = LARGEST_FACTOR if sign == "*" else LARGEST
        a, b = draw.randint(1, largest), draw.randint(1, largest)
        if sign == "-" and a < b:
            a, b = b, a
        answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
        found[draw.choice(_OPERATIONS[sign]).format(a=a, b=b)] = answer
    return [
        {"prompt": prompt, "answer": answer, "split": "heldout" if row < heldout else "train"}
        for row, (prompt, answer) in enumerate(found.items())
    ]


def last_number(text: str) -> Decimal | None:
    """The last number that ``text`` writes in digits, exactly; None where there is none."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def rewards(
    responses: Sequence[str],
    columns: Sequence[Mapping[str, int]],
    token_counts: Sequence[int],
    finished: Sequence[bool],
    *,
    enough: int = 8,
    most: int = 48,
) -> dict[str, list[float]]:
    """``correct``: 1 if the last number of a response is the row's ``answer``, else 0.

    ``brief``: 1 for up to ``enough`` tokens, falling linearly to 0 at ``most``. A response that was cut off
    has 0 of both: its last number may not be whole.
    """
    correct = [
        float(whole and last_number(text) == row["answer"])
        for text, row, whole in zip(responses, columns, finished, strict=True)
    ]
    brief = [
        float(whole) * min(1.0, max(0.0, (most - count) / (most - enough)))
        for count, whole in zip(token_counts, finished, strict=True)
    ]
    return {"correct": correct, "brief": brief}


def main() -> None:
    """Write a file of problems."""
    parser = argparse.ArgumentParser(prog="python -m gapo_mega.demo.arithmetic", description=main.__doc__)
    parser.add_argument("out", metavar="OUT.jsonl")
    parser.add_argument("--count", type=int, default=512, help="problems, the held-out ones included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--heldout", type=int, default=64, help="problems in the split heldout")
    given = parser.parse_args()
    try:
        rows = problems(given.count, given.seed, given.heldout)
    except ValueError as error:
        parser.error(str(error))
    out: Path = local(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} problems, {given.heldout} of them held out")


if __name__ == "__main__":
    main()
