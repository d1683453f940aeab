"""Responses of a replica that servers draw: its first rank asks, and all its ranks get them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from gapo_mega.config import Config
from gapo_mega.rollout.backends.base import Policy
from gapo_mega.rollout.rounds import pauses, still_waits
from gapo_mega.rollout.servers.agreement import from_one
from gapo_mega.rollout.servers.requests import Requests
from gapo_mega.rollout.servers.responses import assemble
from gapo_mega.stopping import StoppedWaiting
from gapo_mega.types import Generation


class AskedResponses:
    """An ``Asked`` of a back end.

    Attributes:
        seconds: from the question to the last response; known after ``result``.
        failed: the server that has lost a question, on the first rank; known after ``result``.
    """

    def __init__(
        self,
        policy: Policy,
        config: Config,
        prompts: Sequence[Sequence[int]],
        requests: Requests | None,
        version: int,
        ended: Callable[[AskedResponses], None],
    ) -> None:
        """``requests``: of the replica's first rank. ``version``: of the weights that draw.

        ``ended`` is called once nobody waits for them any more.
        """
        self._policy = policy
        self._config = config
        self._prompts = prompts
        self._requests = requests
        self._version = version
        self._ended = ended
        self.seconds = 0.0
        self.failed: str | None = None

    def wait(self, seconds: float | None = None) -> bool:
        """Whether they are there, or have failed, within ``seconds``; true where this rank has not asked."""
        return self._requests is None or self._requests.wait(seconds)

    def what_is_open(self) -> str:
        """What those that wait are told."""
        if self._requests is None:
            return ""
        rank, seconds = self._policy.engine.layout.rank, self._config.rollout.vllm.timeout
        open_ = self._requests.what_is_open()
        return f"rank {rank} waits for {open_} (rollout.vllm.timeout: {seconds:g} s for each)"

    def result(self) -> Generation:
        """Takes part in rounds: the other ranks are in no collective for as long as the responses take."""
        engine = self._policy.engine
        share, is_first = engine.broadcast_in_replica, self._requests is not None
        try:
            for seconds in pauses(self._config.parallel.timeout):
                come = from_one(is_first, partial(self._generation, seconds), share)
                if come is not None:
                    generation, self.seconds = come
                    break
                still_waits(engine, self.what_is_open())
        except StoppedWaiting:  # the requests go on
            raise
        except Exception:
            self._ended(self)
            raise
        self._ended(self)
        return generation

    def abandon(self) -> None:
        """Nobody wants them any more."""
        self._ended(self)
        if self._requests is not None:
            self._requests.abandon()

    def _generation(self, seconds: float) -> tuple[Generation, float] | None:
        """None where it does not come within ``seconds``."""
        assert self._requests is not None
        policy, requests = self._policy, self._requests
        if not requests.wait_unless_stopped(seconds):
            return None
        self.failed = requests.failed
        versions_B = torch.full((len(self._prompts),), self._version)
        responses = requests.responses()
        generation = assemble(self._prompts, responses, policy.pad_id, policy.eos_ids, versions_B)
        return generation, requests.seconds
