"""Scores of responses by every objective, checked, the same on every rank of a replica."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from gapo_mega.engine.base import Answering, Ranks
from gapo_mega.objectives.base import Objective, ObjectiveError, TokenScorer
from gapo_mega.option_checks import shown
from gapo_mega.types import Prompt, ResponseFacts
from gapo_mega.user_code import reason_of

Result = TypeVar("Result")


def _checked(name: str, scores: Sequence[float], prompts: Sequence[Prompt]) -> list[float]:
    """The scores of one objective, one for each of ``prompts``, as numbers that are finite in float32."""
    if len(scores) != len(prompts):
        raise ValueError(
            f"objective {name!r}: found {len(scores)} scores, accepted: {len(prompts)}, one for each response"
        )
    limit = torch.finfo(torch.float32).max
    for i, score in enumerate(scores):
        number = isinstance(score, int | float)
        if not number or not abs(score) <= limit:  # a comparison, so that NaN is refused as well
            raise ValueError(
                f"objective {name!r}: found the score {shown(score)} for response {i}, an answer to prompt "
                f"{prompts[i].index}, accepted: a finite number within {limit:.3g}, the range of float32"
            )
    return [float(score) for score in scores]


class _Told(ObjectiveError):
    """``error`` of some data rank, which all of them have heard of. Kinds of objectives let it pass."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def attach_score_models(engine: Answering, objectives: Sequence[Objective]) -> None:
    """Give every objective the score model that it asks for. Collective."""
    for objective in objectives:
        if objective.wanted_model is not None:
            scorer = engine.score_model(objective.wanted_model)
            objective.attach(_together(engine, scorer) if engine.layout.in_step else scorer)


def _together(ranks: Ranks, scorer: TokenScorer) -> TokenScorer:
    """``scorer``, for data ranks that share its experts: where one of them has failed, none goes in.

    The one that has failed is in ``agreed`` by then, and tells them.
    """

    def score(tokens: Sequence[Sequence[int]]) -> list[float]:
        first = _first_failure(ranks, None)
        if first is not None:
            raise _Told(first)
        return scorer(tokens)

    return score


class ResponseScorer:
    """Asks every objective."""

    def __init__(self, ranks: Ranks, objectives: Sequence[Objective]) -> None:
        self._ranks = ranks
        self._objectives = objectives

    def scores(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> Tensor:
        """``[M, B]`` float32. Each response is scored once per replica, not once per rank.

        ``facts``: without them, an objective that asks for token counts or ``finished`` refuses to score.
        Raises ``ValueError``, on every rank of the replica, unless every objective gives one number per
        response that is finite in float32. Data ranks that share experts make this call together, and where
        one of them fails, all raise.
        """
        work = partial(self._scores, prompts, responses, facts)
        return agreed(self._ranks, work) if self._ranks.layout.in_step else work()

    def _scores(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None
    ) -> Tensor:
        local = [objective for objective in self._objectives if objective.wanted_model is None]
        by_name = self._on_first_rank(local, prompts, responses, facts)
        for objective in self._objectives:
            if objective.wanted_model is not None:  # a model over all ranks of the replica
                by_name[objective.name] = objective.score(prompts, responses, facts)
        rows = [_checked(objective.name, by_name[objective.name], prompts) for objective in self._objectives]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(responses))

    def _on_first_rank(
        self,
        objectives: Sequence[Objective],
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        facts: ResponseFacts | None,
    ) -> dict[str, list[float]]:
        """Scores by objective on every rank; the replica's first rank computes them."""
        first = self._ranks.layout.is_first_of_replica
        outcome: dict[str, list[float]] | Exception = {}
        if first:
            try:
                outcome = {each.name: each.score(prompts, responses, facts) for each in objectives}
            except Exception as error:  # every rank must learn of it, or the others wait for ever
                self._ranks.broadcast_in_replica(sendable(error))
                raise
            except SystemExit as error:  # of an objective without the checks of ``ObjectiveKind``
                failed = RuntimeError(reason_of(error))
                self._ranks.broadcast_in_replica(failed)
                raise failed from error
        outcome = self._ranks.broadcast_in_replica(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def agreed(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """What ``work`` gives this replica. Where it fails on some data-parallel ranks, all of them raise.

    The others would wait in the next collective for a rank that has left. Each raises its own error, or else
    that of the first. Collective over the data-parallel ranks.
    """
    own: Exception | None = None
    try:
        result = work()
    except _Told as error:  # they wait nowhere
        raise error.error from None
    except Exception as error:
        own = error
    first = _first_failure(ranks, own)
    if first is None:
        return result
    raise first if own is None else own


def _first_failure(ranks: Ranks, own: Exception | None) -> Exception | None:
    """The first error of a data-parallel rank; ``own``: this one's. Collective over them."""
    everyone = ranks.gather_over_data(None if own is None else sendable(own))
    return next((error for error in everyone if error is not None), None)


def sendable(error: Exception) -> Exception:
    """``error``, or one with its reason where another process could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        return kind(reason_of(error))
    return error
