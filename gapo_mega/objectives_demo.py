"""The demo's two objectives: say it in few words, and make several points.

They pull apart because every further point costs words. The short ways out are closed: an empty or cut-off
reply is not concise, and a row of commas or one word repeated makes no points. A reply that is good for
both exists: one short sentence that lists what there is to say.

Both are plain functions over ``(prompts, responses)`` that return one score in [0, 1] per pair, higher is
better, so they can be named in a configuration as ``gapo_mega.objectives_demo:concise``. They read English.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Full marks from FEWEST_WORDS to ENOUGH_WORDS, none from MOST_WORDS on.
FEWEST_WORDS, ENOUGH_WORDS, MOST_WORDS = 5, 20, 40
CUT_OFF_FACTOR = 0.5
# Separators, and different words, for full marks.
MANY_POINTS, DIFFERENT_WORDS = 5, 6

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*]*$")
_SEPARATOR = re.compile(r"[,;:]|\b(?:and|or|but|then)\b", re.IGNORECASE)


def words(text: str) -> list[str]:
    """The lower-cased words of ``text``; numbers and punctuation are no words."""
    return _WORD.findall(text.lower().replace("’", "'"))


def _concise(response: str) -> float:
    count = len(words(response))
    long_enough = min(1.0, count / FEWEST_WORDS)
    short_enough = min(1.0, max(0.0, (MOST_WORDS - count) / (MOST_WORDS - ENOUGH_WORDS)))
    complete = 1.0 if _SENTENCE_END.search(response.strip()) else CUT_OFF_FACTOR
    return long_enough * short_enough * complete


def concise(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Few words, but whole sentences.

    1 for a complete reply of 5 to 20 words, falling linearly to 0 at 40 words and at none; half of that for a
    reply that stops in the middle of a sentence. Prompts do not matter.
    """
    return [_concise(response) for _, response in zip(prompts, responses, strict=True)]


def _points(response: str) -> float:
    separated = min(1.0, len(_SEPARATOR.findall(response)) / MANY_POINTS)
    varied = min(1.0, len(set(words(response))) / DIFFERENT_WORDS)
    return separated * varied


def points(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Several points instead of one.

    The number of places where a further item or clause begins (a comma, semicolon or colon; *and*, *or*, *but*,
    *then*), which counts up to five, times the number of different words, which counts up to six. Prompts
    do not matter.
    """
    return [_points(response) for _, response in zip(prompts, responses, strict=True)]
