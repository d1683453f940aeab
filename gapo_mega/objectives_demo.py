"""The demo's two objectives: be concise, and stay on topic with something to say.

They pull apart because every word that takes up the question or adds to it costs brevity, and the two
shortest ways out are closed: an empty or cut-off reply is not concise, and a reply that only repeats the
question is not on topic. A reply that is good for both exists: one short sentence that names what was asked
and says something about it.

Both are plain functions over ``(prompts, responses)`` that return one score in [0, 1] per pair, higher is
better, so they can be named in a configuration as ``gapo_mega.objectives_demo:concise``. They read English.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import snowballstemmer

# Full marks from FEWEST_WORDS to ENOUGH_WORDS, none from MOST_WORDS on.
FEWEST_WORDS, ENOUGH_WORDS, MOST_WORDS = 5, 10, 40
CUT_OFF_FACTOR = 0.5
# Content words that a reply must add to those of the question for full marks.
OWN_CONTENT_WORDS = 4

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*]*$")


def words(text: str) -> list[str]:
    """The lower-cased words of ``text``; numbers and punctuation are no words."""
    return _WORD.findall(text.lower().replace("’", "'"))


# Words that carry grammar and no topic: articles, pronouns, prepositions, conjunctions, auxiliaries and the
# verbs that prompts are phrased with.
_FUNCTION_WORDS = frozenset(
    words(
        "a about after again all also an and another any are as at be because been before being both "
        "but by can could did do does doing down each either else even ever every few for from get "
        "gets give had has have having he her here hers him his how i if in into is it its itself "
        "just let like made make makes many may me might mine more most much must my no nor not now "
        "of off on once one only onto or other our ours out over own per please same shall she should "
        "since so some someone something such tell than that the their theirs them then there these "
        "they this those through to too under until up upon us very was we were what when where "
        "whether which while who whom whose why will with within without would write yes yet you your "
        "yours"
    )
)


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return str(snowballstemmer.stemmer("english").stemWord(word))


def topics(text: str) -> frozenset[str]:
    """The stems (Snowball, English) of the content words of ``text``: *folded*, *folding* are one topic."""
    content = (word for word in words(text) if word.split("'")[0] not in _FUNCTION_WORDS and len(word) > 1)
    return frozenset(_stem(word) for word in content)


def _concise(response: str) -> float:
    count = len(words(response))
    long_enough = min(1.0, count / FEWEST_WORDS)
    short_enough = min(1.0, max(0.0, (MOST_WORDS - count) / (MOST_WORDS - ENOUGH_WORDS)))
    complete = 1.0 if _SENTENCE_END.search(response.strip()) else CUT_OFF_FACTOR
    return long_enough * short_enough * complete


def concise(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Few words, but whole sentences.

    1 for a complete reply of 5 to 10 words, falling linearly to 0 at 40 words and at none; half of that for a
    reply that stops in the middle of a sentence. Prompts do not matter.
    """
    return [_concise(response) for _, response in zip(prompts, responses, strict=True)]


def _on_topic(prompt: str, response: str) -> float:
    asked, said = topics(prompt), topics(response)
    if not asked:
        raise ValueError(
            f"on_topic: found the prompt {prompt!r}, which has no content words; accepted: English prompts"
        )
    taken_up = len(asked & said) / len(asked)
    added = min(1.0, len(said - asked) / OWN_CONTENT_WORDS)
    return taken_up * added


def on_topic(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Takes up the question and adds to it.

    The share of the prompt's content words that the reply takes up (compared by stem), times the number of
    other content words in the reply, which counts up to four: repeating the question earns nothing.
    ``ValueError`` where a prompt has no content words.
    """
    return [_on_topic(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
