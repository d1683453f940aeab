"""Asks a judge about the responses of two models; what it has said once is not asked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from gapo_mega.evaluation.answers import Answer
from gapo_mega.evaluation.intervals import Resampling
from gapo_mega.evaluation.judged import Judged, Judgement, Outcome, judged
from gapo_mega.objectives.pairwise import PairwiseJudge, PairwiseOptions, verdict_of
from gapo_mega.types import Prompt
from gapo_mega.whereabouts import get_on

JUDGEMENTS_FILE = "judgements.jsonl"


class Judging:
    """Every later model against the first, by every rubric; of each prompt the first response counts.

    ``file`` has a line for every request: what was asked for, and what the judge said. The digest of a
    request finds it again.
    """

    def __init__(self, options: PairwiseOptions, where: str, file: Path) -> None:
        """``where``: what errors begin with."""
        self._options = options
        self._judge = PairwiseJudge(options, where)
        self._file = file
        self._said = _read(file)

    def judge(
        self,
        prompts: Sequence[Prompt],
        answers: Mapping[str, Sequence[Answer]],
        samples: int,
        how: Resampling,
    ) -> list[Judged]:
        """Ask what is not known yet. Raises ``ValueError`` where the endpoint fails; what it said stays."""
        against, *models = answers
        results = []
        for model in models:
            for rubric in self._options.rubrics:
                pairs = zip(answers[model][::samples], answers[against][::samples], strict=True)
                found = self._pairs(rubric, (model, against), prompts, list(pairs))
                results.append(judged(rubric, model, against, found, how))
        return results

    def _pairs(
        self,
        rubric: str,
        names: tuple[str, str],
        prompts: Sequence[Prompt],
        pairs: Sequence[tuple[Answer, Answer]],
    ) -> list[Judgement]:
        model, against = names
        with self._appending() as say, ThreadPoolExecutor(self._options.concurrency) as threads:

            def one(number: int) -> Judgement:
                mine, theirs = (answer.response for answer in pairs[number])
                if mine == theirs:
                    return Judgement("neither", "neither", asked=False)
                found: list[Outcome | None] = []
                for order in (("model", "against"), ("against", "model")):
                    texts = [mine if who == "model" else theirs for who in order]
                    conversation = prompts[number].answered("")[:-1]
                    request = self._judge.request(rubric, conversation, texts[0], texts[1])
                    about = {"rubric": rubric, "model": model, "against": against, "number": number}
                    words = say(request, {**about, "first": model if order[0] == "model" else against})
                    found.append(_outcome(words, order))
                return Judgement(found[0], found[1])

            # map keeps the order; its first error cancels what has not begun.
            return list(threads.map(one, range(len(pairs))))

    @contextmanager
    def _appending(self) -> Iterator[Callable[[dict[str, object], Mapping[str, object]], str]]:
        with self._file.open("a", encoding="utf-8") as file:
            lock = Lock()

            def say(request: dict[str, object], about: Mapping[str, object]) -> str:
                digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
                if digest not in self._said:
                    words = self._judge.ask(request)
                    line = json.dumps({**about, "request": digest, "said": words}, ensure_ascii=False)
                    with lock:
                        file.write(line + "\n")
                        file.flush()
                        self._said[digest] = words
                    get_on()
                return self._said[digest]

            yield say


def _outcome(words: str, order: tuple[str, str]) -> Outcome | None:
    verdict = verdict_of(words)
    if verdict is None or verdict == "neither":
        return verdict
    preferred = order[0] if verdict == "first" else order[1]
    return "model" if preferred == "model" else "against"


def _read(file: Path) -> dict[str, str]:
    """By digest of the request what was said. A last line without its end is cut off.

    Raises ``ValueError`` for a line of something else.
    """
    if not file.is_file():
        return {}
    whole, _, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        file.write_bytes(whole + b"\n" if whole else b"")
    found = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            entry = json.loads(line)
            found[str(entry["request"])] = str(entry["said"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"--out: {file}, line {number}: found no judgement, accepted: a file that gapo-mega evaluate "
                "wrote"
            ) from None
    return found
