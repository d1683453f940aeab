"""Rollouts of coming steps, drawn while the policy is trained on earlier ones (``rollout.ahead``).

With ``ahead`` k, steps are dealt with in groups of k. At the first step of a group its responses must have
come; the back end takes the policy as it is then, and is asked for those of the *next* group. So the
responses of step s (from 0) are of the policy after ``max(0, (s // k - 1) k)`` steps: after s - 1 with k = 1,
and k to 2 k - 1 steps old otherwise. No request is under way while weights are sent, and which policy answers
what depends on the step's number alone: not on speed, and not on where a run was interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from gapo_mega.engine.base import Engine
from gapo_mega.rollout.backends import Asked, RolloutBackend
from gapo_mega.rollout.collect import Collector, own_seed
from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.response_scores import sendable
from gapo_mega.rollout.rounds import gathered, wait_for_all
from gapo_mega.rollout.saved import from_lists, to_lists
from gapo_mega.rollout.score import Timer
from gapo_mega.types import Generation, Prompt, Rollout

logger = logging.getLogger(__name__)

# A checkpoint waits for so many times the longest rollout so far, and so many seconds more.
_PATIENCE, _SLACK = 3.0, 30.0
_SILENT = 5.0  # seconds that it waits without saying so


@dataclass(frozen=True)
class Steps:
    """What is asked for at the steps of a run, which count from 0.

    Attributes:
        total: their number.
        prompts: this data-parallel rank's, by step.
        seed: by step.
        samples: responses per prompt.
        greedy: whether the estimator also wants the greedy response to every prompt.
    """

    total: int
    prompts: Callable[[int], list[Prompt]]
    seed: Callable[[int], int]
    samples: int
    greedy: bool = False


@dataclass(frozen=True)
class Sampled:
    """The responses of a step, those of greedy decoding if the estimator wants them, and the log's facts."""

    rollout: Rollout
    greedy: Rollout | None
    facts: dict[str, float]


@dataclass
class _Batch:
    """What is asked for, or was found, for one step; several rollouts with greedy ones."""

    policy_step: int  # steps that the policy had done which answers
    asked: list[Asked] = field(default_factory=list)
    found: list[Generation] | None = None
    seconds: float = 0.0  # from the question to the last response
    begun: float = field(default_factory=time.monotonic)

    def wait(self, end: float) -> bool:
        """Whether this rank has nothing more to wait for, by ``end`` of ``time.monotonic``."""
        return all(one.wait(max(0.0, end - time.monotonic())) for one in self.asked)

    def results(self) -> list[Generation]:
        """Waits for them. Collective over the replica."""
        if self.found is None:
            found = [one.result() for one in self.asked]
            self.seconds = max(one.seconds for one in self.asked)
            self.found, self.asked = found, []
        return self.found

    def drop(self) -> None:
        for one in self.asked:
            one.abandon()
        self.asked, self.found = [], None


class Ahead:
    """The rollouts of a run's steps, asked for ``ahead`` of them. Every rank has one, and calls alike."""

    def __init__(
        self,
        engine: Engine,
        backend: RolloutBackend,
        collector: Collector,
        steps: Steps,
        ahead: int,
        timer: Timer,
    ) -> None:
        """``collector``: over ``backend``. ``timer`` measures the phase ``rollout``."""
        assert ahead > 0 and backend.answers_beside, ahead
        self._engine = engine
        self._backend = backend
        self._collector = collector
        self._steps = steps
        self._ahead = ahead
        self._timer = timer
        self._batches: dict[int, _Batch] = {}  # by step
        self._waited = 0.0  # seconds, since the last step
        self._longest = 0.0  # seconds of a rollout so far; 0 before the first

    def take(self, step: int) -> Sampled:
        """The rollout of ``step``, at whose beginning the policy is. Collective.

        Those of the next group are under way afterwards. Raises what the back end raises.
        """
        with self._timer("rollout"):
            self._batches = {number: batch for number, batch in self._batches.items() if number >= step}
            self._ask_missing(step, range(step, step + self._ahead - step % self._ahead))
            found = self._drawn(step, step)
            seconds = 0.0
            if step % self._ahead == 0:
                for number in sorted(self._batches):
                    self._drawn(number, step)
                started = time.perf_counter()
                self._ask_missing(step, range(step + self._ahead, step + 2 * self._ahead))
                seconds = time.perf_counter() - started
            facts = self._facts(step, seconds)
        prompts = self._steps.prompts(step)
        rollout = self._collector.rollout(prompts, self._steps.samples, found[0])
        greedy = self._collector.rollout(prompts, 1, found[1]) if self._steps.greedy else None
        return Sampled(rollout, greedy, facts)

    def settle(self) -> None:
        """Wait until nothing is under way, so that weights may be sent. Raises nothing of what went wrong.

        Collective.
        """
        started = time.perf_counter()
        self._wait(lambda end: all(batch.wait(end) for batch in self._batches.values()), "an evaluation")
        self._waited += time.perf_counter() - started

    def drop(self) -> None:
        """Want no further step."""
        for batch in self._batches.values():
            batch.drop()
        self._batches = {}

    # -- checkpoints -------------------------------------------------------------------------------
    def state_dict(self, step: int) -> dict[str, Any]:
        """What a run that goes on after ``step`` steps cannot ask for again, for its policy is gone.

        Waits for it, but not for several times as long as rollouts have taken so far: a server may hang.
        Collective. What does not come is left out, here too, and is asked of the policy then.
        """
        started = time.perf_counter()
        older = {n: b for n, b in self._batches.items() if n >= step and b.policy_step < step}
        batches = {
            str(number): {
                "policy_step": batch.policy_step,
                "seconds": batch.seconds,
                "rollouts": [to_lists(one) for one in found],
            }
            for number, batch in sorted(older.items())
            if (found := self._agreed(number, batch))
        }
        self._waited += time.perf_counter() - started
        return {"data_ranks": self._engine.layout.data, "batches": batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``. Another number of data ranks has other rows: it asks for them anew."""
        if not state or not state["batches"]:
            return
        if state["data_ranks"] != self._engine.layout.data:
            self._tell("responses were drawn ahead for %d data-parallel ranks", state["data_ranks"])
            return
        for number, saved in state["batches"].items():
            found = [from_lists(one) for one in saved["rollouts"]]
            if len(found) == 1 + self._steps.greedy:
                self._batches[int(number)] = _Batch(saved["policy_step"], [], found, saved["seconds"])
                self._longest = max(self._longest, saved["seconds"])

    def _agreed(self, step: int, batch: _Batch) -> list[Generation] | None:
        """The batch's rollouts; None, and the batch is gone, where some data-parallel rank has none."""
        first = self._late(step, batch)
        if first is None:
            own: Exception | None = None
            try:
                batch.results()
            except Exception as error:
                own = error
            told = gathered(self._engine, None if own is None else sendable(own))
            first = next((error for error in told if error is not None), None)
        if first is None:
            return batch.found
        self._tell("the responses of step %d, drawn ahead, did not come (%s)", step + 1, first)
        batch.drop()
        del self._batches[step]
        return None

    def _late(self, step: int, batch: _Batch) -> Exception | None:
        """What to say where some replica still waits, after a time that rollouts do not take."""
        limit = _PATIENCE * self._longest + _SLACK if self._longest else inf
        if not batch.wait(time.monotonic() + _SILENT) and self._engine.layout.is_main:
            told = "" if limit == inf else f", until {limit:.0f} s after they were asked for"
            logger.warning("a checkpoint waits for the responses of step %d, drawn ahead%s", step + 1, told)
        last = batch.begun + limit
        self._wait(lambda end: batch.wait(min(end, last)) or time.monotonic() >= last, "a checkpoint")
        own = self._engine.broadcast_in_replica(batch.wait(0.0))
        if all(self._engine.gather_over_data(own)):
            return None
        return TimeoutError(f"not within {limit:.0f} s")

    def _wait(self, come: Callable[[float], bool], whose: str) -> None:
        """Until ``come`` by some time of ``time.monotonic`` on all ranks."""
        wait_for_all(
            self._engine,
            lambda seconds: come(time.monotonic() + seconds),
            lambda: f"{whose} waits for responses that rank {self._engine.layout.rank} has asked for",
            self._backend.config.parallel.timeout,
        )

    def _tell(self, message: str, *arguments: object) -> None:
        if self._engine.layout.is_main:
            logger.warning(message + "; they are drawn anew, by the policy as it is then", *arguments)

    # -- asking ------------------------------------------------------------------------------------
    def _ask_missing(self, step: int, wanted: Iterable[int]) -> None:
        """Ask the policy, which has done ``step`` steps, for what nobody was asked for yet."""
        missing = [i for i in wanted if i < self._steps.total and i not in self._batches]
        if missing:
            self._collector.update_weights()
        for number in missing:
            self._batches[number] = _Batch(step)
            self._ask(number)

    def _ask(self, number: int) -> None:
        batch, steps = self._batches[number], self._steps
        batch.drop()
        batch.begun = time.monotonic()
        prompts, seed = steps.prompts(number), own_seed(steps.seed(number), self._engine.layout)
        for samples, greedy in [(steps.samples, False), (1, True)][: 1 + steps.greedy]:
            batch.asked.append(self._backend.ask(*self._collector.question(prompts, samples, greedy), seed))

    def _drawn(self, number: int, step: int) -> list[Generation]:
        """The rollouts of step ``number``. What is lost is asked of the policy as it is now, in ``step``."""
        again = False

        def work() -> list[Generation]:
            nonlocal again
            if again:
                self._batches[number].policy_step = step
                self._ask(number)
            again = True
            return self._batches[number].results()

        started = time.perf_counter()
        found = recovered(self._engine, self._collector.update_weights, work)
        self._waited += time.perf_counter() - started
        return found

    def _facts(self, step: int, weights_seconds: float) -> dict[str, float]:
        """What the log says of a step's rollout; waiting since the last step counts.

        ``rollout/staleness``: steps between the policy that drew it and the one that is trained on it;
        ``rollout/seconds``: from asking to the last response; ``rollout/waited``: how many seconds the
        training waited for responses; ``rollout/overlap``: share of the rollout's time that it did not wait;
        ``rollout/weights``: seconds of sending weights and asking for the next rollouts.
        """
        batch, waited, self._waited = self._batches[step], self._waited, 0.0
        seconds = max(self._engine.gather_over_data(batch.seconds))
        self._longest = max(self._longest, seconds)
        return {
            "rollout/staleness": float(step - batch.policy_step),
            "rollout/seconds": seconds,
            "rollout/waited": waited,
            "rollout/overlap": max(0.0, 1.0 - waited / seconds) if seconds > 0 else 0.0,
            "rollout/weights": weights_seconds,
        }
