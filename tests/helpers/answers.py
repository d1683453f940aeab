"""Responses of models that a test makes up."""

from __future__ import annotations

from collections.abc import Sequence

from gapo_mega.evaluation.answers import Answer


def answers(scores: Sequence[float], samples: int = 1, text: str = "yes", **more: float) -> list[Answer]:
    """One answer a score, with ``samples`` to each prompt; ``more`` are scores by other objectives."""
    return [
        Answer(
            number=index // samples,
            sample=index % samples,
            prompt=f"prompt {index // samples}",
            response=f"{text} {index}",
            tokens=index + 1,
            finished=index % 2 == 0,
            kl=0.5 * index,
            scores={"kind": score, **more},
        )
        for index, score in enumerate(scores)
    ]
