"""The responses of one model on the disk: what is there, what still counts, what is to be done.

``settings.json`` says what the responses belong to. Where an objective is new or has changed, the responses
stay, and move to ``EARLIER`` until they are scored again. A process killed at any moment loses what it had
not yet added to ``responses.jsonl``, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gapo_mega.evaluation.answers import (
    RESPONSES_FILE,
    Answer,
    append_answers,
    cut_answers,
    read_answers,
    whole_prompts,
    write_answers,
)
from gapo_mega.evaluation.files import write_text

SETTINGS_FILE = "settings.json"
EARLIER = "earlier.jsonl"
Settings = Mapping[str, Any]  # JSON


@dataclass(frozen=True)
class Belonging:
    """What responses belong to, as JSON.

    Attributes:
        generation: with anything else here, they are other responses.
        objectives: by name: with anything else, it is another score of the same response.
    """

    generation: Settings
    objectives: Settings


class AnswerStore:
    """One model's folder. Only one process uses it."""

    def __init__(self, folder: Path, belonging: Belonging, samples: int) -> None:
        self.folder = folder
        self._belonging = belonging
        self._samples = samples
        self._path = folder / RESPONSES_FILE
        self._earlier: dict[int, list[Answer]] = {}
        self.done = 0  # prompts, from the first on, whose responses are there with all scores

    def check(self) -> None:
        """Raise ``ValueError`` where the folder holds responses that belong to something else."""
        known = self._read_settings()
        if known is None:
            if self._path.exists():
                raise ValueError(
                    f"--out: found {self._path} without {SETTINGS_FILE} beside it, accepted: another "
                    "directory, or --overwrite"
                )
            return
        mine, theirs = self._belonging.generation, known.generation
        for key in [*mine, *theirs]:
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"--out: found {self.folder}, whose responses have {key} {_shown(theirs.get(key))}, here "
                    f"it is {_shown(mine.get(key))}; accepted: the same, another directory, or --overwrite"
                )

    def open(self, overwrite: bool) -> None:
        """Take what is there and still counts; ``overwrite`` removes it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in (SETTINGS_FILE, RESPONSES_FILE, EARLIER):
                (self.folder / name).unlink(missing_ok=True)
        self.check()
        known = self._read_settings() or Belonging({}, {})
        mine = self._belonging.objectives
        stale = {name for name in mine if name in known.objectives and known.objectives[name] != mine[name]}
        there = read_answers(self._path)
        there = there[: whole_prompts(there, self._samples) * self._samples]
        earlier = self._by_prompt(read_answers(self.folder / EARLIER))
        if stale or any(name not in answer.scores for answer in there for name in mine):
            earlier |= self._by_prompt(there)
            self._set_aside(earlier, stale)
            there = []
        # After the files: with the old settings, a process that is killed before finds its work to do again.
        objectives = {**known.objectives, **mine}
        about = {"generation": self._belonging.generation, "objectives": objectives}
        write_text(self.folder / SETTINGS_FILE, json.dumps(about, indent=1) + "\n")
        self.done = len(there) // self._samples
        cut_answers(self._path, len(there))
        self._earlier = {
            number: [self._without(answer, stale) for answer in answers]
            for number, answers in earlier.items()
            if number >= self.done and len(answers) == self._samples
        }

    def earlier(self, number: int) -> list[Answer] | None:
        """The responses to a prompt that lack scores; None: there are none yet."""
        return self._earlier.get(number)

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep the responses to the next prompts, with all scores."""
        append_answers(self._path, answers)
        self.done += len(answers) // self._samples

    def close(self) -> list[Answer]:
        """All responses, once every prompt has its own."""
        (self.folder / EARLIER).unlink(missing_ok=True)
        return read_answers(self._path)

    def _set_aside(self, earlier: Mapping[int, Sequence[Answer]], stale: set[str]) -> None:
        rows = [self._without(answer, stale) for number in sorted(earlier) for answer in earlier[number]]
        write_answers(self.folder / EARLIER, rows)
        self._path.unlink(missing_ok=True)

    @staticmethod
    def _without(answer: Answer, stale: set[str]) -> Answer:
        return replace(answer, scores={k: v for k, v in answer.scores.items() if k not in stale})

    @staticmethod
    def _by_prompt(answers: Sequence[Answer]) -> dict[int, list[Answer]]:
        found: dict[int, list[Answer]] = {}
        for answer in answers:
            found.setdefault(answer.number, []).append(answer)
        return found

    def _read_settings(self) -> Belonging | None:
        path = self.folder / SETTINGS_FILE
        if not path.is_file():
            return None
        try:
            return Belonging(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(
                f"--out: found {path}, which is not as an evaluation writes it, accepted: another directory, "
                "or --overwrite"
            ) from None


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
