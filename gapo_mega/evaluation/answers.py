"""``responses.jsonl``: one line a response, with its prompt, every score, and what else is known of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gapo_mega.evaluation.files import flush, replacing

RESPONSES_FILE = "responses.jsonl"


@dataclass(frozen=True)
class Answer:
    """One response of a model.

    Attributes:
        number: of the prompt among those of the evaluation, from 0.
        sample: which response to it, from 0.
        prompt: what the user asked last.
        tokens: of the response, the end-of-sequence token included.
        finished: whether that was produced.
        kl: log pi(response) - log reference(response) in nats, whose mean estimates the divergence; None: not
            measured.
        scores: by objective.
    """

    number: int
    sample: int
    prompt: str
    response: str
    tokens: int
    finished: bool
    kl: float | None = None
    scores: dict[str, float] = field(default_factory=dict)


def read_answers(path: Path) -> list[Answer]:
    """The lines of ``path``; none where it is not there. A last line without its end is left out.

    Raises ``ValueError`` with file and line for one that holds something else.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(Answer(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: found no response ({error}), accepted: a file that gapo-mega "
                "evaluate wrote"
            ) from None
    return found


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Replace ``path``; readers see the old file or the new one."""
    with replacing(path) as partial:
        partial.write_text("".join(map(_line, answers)), encoding="utf-8")


def append_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Add lines; they are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(map(_line, answers)))
    flush(path)


def cut_answers(path: Path, lines: int) -> None:
    """Leave the first ``lines`` lines, which are there, and no part of another."""
    if not path.is_file():
        return
    data = path.read_bytes()
    end = 0
    for _ in range(lines):
        end = data.index(b"\n", end) + 1
    if end < len(data):
        os.truncate(path, end)
        flush(path)


def whole_prompts(answers: Sequence[Answer], samples: int) -> int:
    """How many prompts, from the first on, have all their ``samples`` responses in order."""
    count = 0
    for answer in answers:
        if (answer.number, answer.sample) != divmod(count, samples):
            break
        count += 1
    return count // samples


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False, allow_nan=False) + "\n"
