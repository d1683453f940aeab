"""What every rollout back end shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from gapo_mega.config import Config
from gapo_mega.engine.base import Engine, SamplingParameters
from gapo_mega.types import Generation


@dataclass(frozen=True)
class Policy:
    """The policy that a back end answers for.

    Attributes:
        engine: trains it, and gives its parameters by ``named_weights``.
        companions: directory of its configuration and tokenizer; weights that lie there are those from
            before training, if any.
        pad_id, eos_ids: its tokenizer's.
        vocabulary: tokens that its output layer has; None: not said.
    """

    engine: Engine
    companions: Path
    pad_id: int
    eos_ids: tuple[int, ...]
    vocabulary: int | None = None


class Asked(Protocol):
    """Responses that are under way; every rank of a replica has them."""

    seconds: float  # from the question to the last response, the same on every rank; known after ``result``

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until ``result`` has nothing to wait for on this rank; false where that takes longer.

        Not collective, and raises nothing of theirs.
        """
        ...

    def result(self) -> Generation:
        """As ``generate``. Collective over the replica. After ``StoppedWaiting`` it may be called again."""
        ...

    def abandon(self) -> None:
        """Nobody wants them any more. Waits for nothing; may be called at any time."""
        ...


class RolloutBackend(ABC):
    """Samples the responses of a training: one object a rank.

    All methods are collective over the ranks of the world, but ``generate``, which is over those of a
    replica and called within ``recovered`` alone, so that replicas may take unlike times. What a back end
    waits for it waits for a bounded time, and asks ``gapo_mega.stopping`` meanwhile.
    """

    name: ClassVar[str]
    # Whether it samples from the trained parameters themselves, with the arithmetic of the trainer's forward.
    # Then there is nothing to correct (``algorithm.correction``).
    samples_policy: ClassVar[bool] = False
    # Whether it answers while the policy is trained (``rollout.ahead``): then it has ``ask``.
    answers_beside: ClassVar[bool] = False

    def __init__(self, policy: Policy, config: Config) -> None:
        self.policy = policy
        self.config = config

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ``ValueError`` for settings that it cannot work with, before a model is built."""
        return None

    @classmethod
    def check_here(cls, config: Config) -> None:
        """Raise ``ValueError`` for what it needs and this machine has not. No plan asks."""
        return None

    @abstractmethod
    def update_weights(self) -> None:
        """Have the next responses be those of the policy as it is now.

        Takes the parameters from ``engine.named_weights``, a tensor at a time, if they changed since it last
        did. Called before everything that is answered, also before the first rollout. Waits until what is
        asked for has come, before it changes what draws it.
        """

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> Generation:
        """Responses for token-id prompts, in their order; the same on every rank of a replica.

        ``logprobs_BT`` are of the distribution that was sampled from, with repetition penalty and
        temperature. ``versions_B`` has the engine's ``changes`` at the ``update_weights`` before. Every
        replica passes another ``seed``. Raises ``rollout.servers.lost.ServerLost`` where the same rollout
        may succeed after another ``update_weights``: the caller does both.
        """

    def rest(self) -> None:
        """Let go of memory that others may use: nothing is asked before the next ``update_weights``."""
        return None

    def figures(self) -> dict[str, float]:
        """What the log has of the weights that were sent since the last call; the same on every rank.

        ``weights/seconds`` and ``weights/bytes`` of all updates in sum; nothing where none are sent ever.
        """
        return {}

    def ask(self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int) -> Asked:
        """As ``generate``, without waiting: the responses are drawn while this rank does other work.

        Not collective, but every rank of the world calls it alike. Only where ``answers_beside`` is true.
        """
        raise NotImplementedError(f"{type(self).__name__} answers nothing beside training")

    def close(self) -> None:
        """Let go of processes and connections. Not collective; called at every end of a run."""
        return None
