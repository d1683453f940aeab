"""The demo's two objectives: say it in few words, and say it in plain words.

They pull apart because what makes a reply short (fewer small words, the meaning packed into long ones)
makes it less plain, and plain words need more of each other. The short ways out are closed: an empty or
cut-off reply is not concise, and a reply of a few words is not plain. A reply that is good for both exists:
one short sentence in everyday words.

Both are plain functions over ``(prompts, responses)`` that return one score in [0, 1] per pair, higher is
better, so they can be named in a configuration as ``gapo_mega.demo.rewards:concise``. They read English.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Replies of fewer words lose marks on both.
FEWEST_WORDS = 5
# Concise: full marks up to ENOUGH_WORDS, none from MOST_WORDS on.
ENOUGH_WORDS, MOST_WORDS = 10, 40
CUT_OFF_FACTOR = 0.5
# Plain: full marks for words of SHORT letters on average, none for LONG. English prose has 4 to 5.
SHORT, LONG = 3.0, 7.0

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*]*$")


def words(text: str) -> list[str]:
    """The lower-cased words of ``text``; numbers and punctuation are no words."""
    return _WORD.findall(text.lower().replace("’", "'"))


def _share(value: float, none: float, full: float) -> float:
    """0 at ``none``, 1 at ``full``, a line between them."""
    return min(1.0, max(0.0, (value - none) / (full - none)))


def _concise(response: str) -> float:
    count = len(words(response))
    complete = 1.0 if _SENTENCE_END.search(response.strip()) else CUT_OFF_FACTOR
    return _share(count, 0, FEWEST_WORDS) * _share(count, MOST_WORDS, ENOUGH_WORDS) * complete


def concise(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Few words, but whole sentences.

    1 for a complete reply of 5 to 10 words, falling linearly to 0 at 40 words and at none; half of that for
    a reply that stops in the middle of a sentence. Prompts do not matter.
    """
    return [_concise(response) for _, response in zip(prompts, responses, strict=True)]


def _plain(response: str) -> float:
    found = words(response)
    if not found:
        return 0.0
    letters = sum(map(len, found)) / len(found)
    return _share(len(found), 0, FEWEST_WORDS) * _share(letters, LONG, SHORT)


def plain(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Short, everyday words.

    1 for words of 3 letters on average, falling linearly to 0 at 7; less for a reply of fewer than 5 words,
    0 for none. Prompts do not matter.
    """
    return [_plain(response) for _, response in zip(prompts, responses, strict=True)]
