"""Objectives of very different kind and scale that pull against each other, for the comparison of methods.

- ``example``: rare and verifiable. 1 where a reply says in so many words that it gives an example, else 0;
  SmolLM2-135M-Instruct does so in 6 % of its replies to the demo's prompts.
- ``brief``: saturating. 1 for a complete reply of up to 20 words, so that there is soon nothing to gain.
- ``plain``: dense, in [0, 100]. Every word counts, in another unit than the rest.

A fourth one is learned and noisy: the reward model of examples/pipeline/reward.yaml. An example costs words,
which ``brief`` takes marks for; what is brief packs its meaning into long words, which ``plain`` takes marks
for; a model of what is helpful likes many words. All read English.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gapo_mega.demo.rewards import plain as plain_share
from gapo_mega.demo.rewards import words

ENOUGH_WORDS, MOST_WORDS = 20, 40
PLAIN_SCALE = 100.0
_EXAMPLE = re.compile(r"\b(?:for example|for instance|such as|e\.g\.)", re.IGNORECASE)


def example(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for a reply with "for example", "for instance", "such as" or "e.g.", else 0."""
    return [float(bool(_EXAMPLE.search(response))) for _, response in zip(prompts, responses, strict=True)]


def brief(prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """1 up to 20 words, falling linearly to 0 at 40; 0 for an empty reply or one that was cut off."""
    scores = []
    for response, complete in zip(responses, finished, strict=True):
        count = len(words(response))
        share = min(1.0, max(0.0, (MOST_WORDS - count) / (MOST_WORDS - ENOUGH_WORDS)))
        scores.append(share if complete and count else 0.0)
    return scores


def plain(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The demo's ``plain`` times 100."""
    return [PLAIN_SCALE * score for score in plain_share(prompts, responses)]
