"""vLLM in a process and an environment of its own, asked over its HTTP API (docs/rollouts.md)."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from gapo_mega.config import Config, VllmConfig
from gapo_mega.credentials import revealed
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.files import local
from gapo_mega.rollout.backends.base import Policy, RolloutBackend
from gapo_mega.rollout.response_scores import sendable
from gapo_mega.rollout.rounds import wait_for_all
from gapo_mega.rollout.servers.agreement import from_one
from gapo_mega.rollout.servers.asked import AskedResponses
from gapo_mega.rollout.servers.checks import check_python, check_settings
from gapo_mega.rollout.servers.client import Patience, VllmServer
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.rollout.servers.process import ServerProcess
from gapo_mega.rollout.servers.questions import Questions
from gapo_mega.rollout.servers.requests import Requests
from gapo_mega.rollout.servers.responses import Response
from gapo_mega.rollout.servers.shares import servers_of
from gapo_mega.rollout.servers.transfers.registry import TRANSFERS
from gapo_mega.types import Generation

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
_ATTEMPTS = 2  # of an update of the weights; a server of ours is started again in between
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Vllm(RolloutBackend):
    """Samples on servers that the run starts, or on servers that are there, which data ranks share.

    Rank 0 sends the weights to all servers; the first rank of every replica asks for its responses. A label
    of the weights travels with them and comes back with every response, so that none of other weights is
    taken, whoever restarted the server.
    """

    name: ClassVar[str] = "vllm"
    answers_beside: ClassVar[bool] = True

    def __init__(self, policy: Policy, config: Config) -> None:
        """Starts the servers that are the run's own, and does not wait for them."""
        super().__init__(policy, config)
        self._options = options = config.rollout.vllm
        self._transfer = TRANSFERS[options.transfer](options)
        self._patience = Patience(options.timeout, options.patience, options.start_timeout)
        self._servers: list[VllmServer] = []  # known to all ranks after the first update
        self._processes: list[ServerProcess] = []  # those of the servers, on rank 0 of a run that starts them
        self._run = uuid.uuid4().hex[:12]
        self._taken = -1  # the engine's ``changes`` that the servers have
        self._label = ""
        self._asleep = False
        self._sent = {"weights/seconds": 0.0, "weights/bytes": 0.0}  # since the last line of the log
        self._asked: list[AskedResponses] = []  # what has no result yet
        self._failed: set[str] = set()  # servers that have lost a question, as this replica knows
        self._losses = 0  # how often servers were started again for that, as all ranks know
        if options.python is not None and policy.engine.layout.is_main:
            python, arguments = _absolute(options.python), self._arguments(options)
            self._processes = [
                ServerProcess(python, arguments, self._environment(replica))
                for replica in range(options.replicas)
            ]
            for process in self._processes:
                process.start()

    @classmethod
    def check(cls, config: Config) -> None:
        check_settings(config)

    @classmethod
    def check_here(cls, config: Config) -> None:
        TRANSFERS[config.rollout.vllm.transfer].check_here()
        python = config.rollout.vllm.python
        if python is not None:
            check_python(python)
        for replica in range(config.rollout.vllm.replicas):
            _environment(config.rollout.vllm, replica)

    # -- weights -----------------------------------------------------------------------------------
    def update_weights(self) -> None:
        """Raises ``ServerLost`` on all ranks where a server does not come or does not take the weights."""
        engine = self.policy.engine
        version = engine.changes
        if not self._servers:
            urls, self._run = self._from_main(lambda: (self._urls(), self._run))
            self._servers = [VllmServer(url, self._patience, sleeps=self._options.sleep) for url in urls]
        label = f"{self._run}-{version}"
        self._end_failed()
        for attempt in range(1, _ATTEMPTS + 1):
            failure = self._update(label)
            if failure is None:
                break
            again = isinstance(failure, ServerLost) and self._options.python is not None
            if attempt == _ATTEMPTS or not again:
                raise failure
        self._taken, self._label, self._asleep = version, label, False

    def rest(self) -> None:
        """With ``vllm.sleep`` the servers free their memory. Raises ``ServerLost`` as ``update_weights``."""
        if self._options.sleep and not self._asleep:
            self._asleep = True
            self._from_main(self._sleep)

    def _sleep(self) -> None:
        end = self._end()
        for i, server in enumerate(self._servers):
            try:
                server.sleep(end)
            except ServerLost as error:
                if not self._processes:
                    raise
                logger.warning("%s; it is ended", error)  # which frees its memory, too
                self._processes[i].kill()

    def figures(self) -> dict[str, float]:
        found, self._sent = self._sent, dict.fromkeys(self._sent, 0.0)
        return found

    def _end_failed(self) -> None:
        """End those of the run's own servers that have lost a question: they may live, and hang."""
        if self._options.python is None:
            return
        engine = self.policy.engine
        failed = set().union(*engine.gather_over_data(engine.broadcast_in_replica(self._failed)))
        self._failed = set()
        self._losses += bool(failed)
        for process in self._processes:
            if process.url not in failed:
                continue
            if (told := process.how_it_ended()) is not None:
                logger.warning("%s", told)
            else:
                logger.warning("%s: found that it lost a question and still runs; it is ended", process.url)
                process.kill()

    def _update(self, label: str) -> Exception | None:
        """Have all servers answer with the policy's weights. What kept one from it, on all ranks."""
        try:
            stale = self._from_main(lambda: self._stale(label))
        except ServerLost as error:
            if not self._label:  # it was never there, and will not be next time
                raise
            return error
        if not stale:
            return None
        self._settle()
        return self._send(stale, label)

    def _settle(self) -> None:
        """Wait until no rank has a request under way: an update drops those, or mixes their weights."""
        wait_for_all(self.policy.engine, self._wait, self._what_is_open, self.config.parallel.timeout)

    def _wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        return all(asked.wait(max(0.0, end - time.monotonic())) for asked in self._asked)

    def _what_is_open(self) -> str:
        return f"the next weights wait: {'; '.join(asked.what_is_open() for asked in self._asked)}"

    def _urls(self) -> list[str]:
        return [process.url for process in self._processes] or self._options.urls

    def _stale(self, label: str) -> list[int]:
        """Numbers of the servers that have other weights, or none, once all of them answer."""
        for process in self._processes:
            process.start()
        begun = time.monotonic()
        versions = [self._version(i, begun) for i in range(len(self._servers))]
        return [i for i, version in enumerate(versions) if self._asleep or version != label]

    def _version(self, i: int, begun: float) -> str:
        """That of server ``i``, waited for since ``begun``. One of the run's own that has none is ended."""
        server, own = self._servers[i], self._processes[i] if self._processes else None
        starts = own is None or not own.answered
        seconds = self._patience.start if starts else self._patience.absence
        try:
            version = server.wait_until_up(self._check_processes, seconds, begun)
        except ServerLost as error:
            if own is not None and own.is_alive():
                logger.warning("%s; it is ended", error)
                own.kill()
            raise
        if own is not None:
            own.answered = True
        return version

    def _check_processes(self) -> None:
        for process in self._processes:
            process.check()

    def _send(self, stale: Sequence[int], label: str) -> Exception | None:
        """Stream the weights to these servers. Returns on all ranks what kept one from taking them."""
        tensors = self.policy.engine.named_weights()
        if not self.policy.engine.layout.is_main:
            for _ in tensors:
                raise AssertionError("only rank 0 receives tensors")
            return self._told(None, 0.0, 0)
        failure: Exception | None = None
        begun, size = time.perf_counter(), 0
        try:
            size = self._transfer.send([self._servers[i] for i in stale], tensors, label, self._end())
        except Exception as error:
            failure = error
            for i in stale if self._processes else []:
                self._processes[i].kill()  # its weights are in pieces
        return self._told(failure, time.perf_counter() - begun, size * len(stale))

    def _end(self) -> float:
        """By when all servers must have done what they are asked next: other ranks wait meanwhile."""
        return time.monotonic() + self._patience.answer

    # -- answering ---------------------------------------------------------------------------------
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> Generation:
        """Raises ``ServerLost``, or what went wrong otherwise, on all ranks of the replica alike."""
        return self.ask(prompts, sampling, seed).result()

    def ask(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> AskedResponses:
        requests = self._requests(prompts, sampling, seed)
        ended = partial(self._ended, self._losses)
        asked = AskedResponses(self.policy, self.config, prompts, requests, self._taken, ended)
        self._asked.append(asked)
        return asked

    def _ended(self, losses: int, asked: AskedResponses) -> None:
        """``losses``: how many there were when it was asked; what was lost before the last is settled."""
        if asked in self._asked:
            self._asked.remove(asked)
        if asked.failed is not None and losses == self._losses:
            self._failed.add(asked.failed)

    def close(self) -> None:
        for server in self._servers:
            server.give_up()
        for asked in list(self._asked):
            asked.abandon()
        for process in self._processes:
            process.close()

    def _requests(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> Requests | None:
        """Those of this rank; None where another one of the replica has them."""
        layout, policy = self.policy.engine.layout, self.policy
        if not layout.is_first_of_replica:
            return None
        questions = Questions(self._label, sampling, seed, policy.eos_ids, policy.vocabulary)
        servers = servers_of(prompts, self._servers, layout.data_rank, layout.data)

        def ask(row: int) -> Response:
            return questions.ask(servers[row], prompts[row], row)

        return Requests(ask, [server.url for server in servers], self.config.rollout.batch_size)

    def _arguments(self, options: VllmConfig) -> list[str]:
        config = self.config
        given = {
            "--model": _absolute(self.policy.companions),
            "--load-format": "dummy",  # the weights come from the run
            "--dtype": _DTYPES[config.model.dtype],
            "--max-model-len": str(config.longest),
            "--logprobs-mode": "processed_logprobs",  # of the distribution that is drawn from
            "--max-logprobs": "-1",  # of as many tokens as top-k leaves
            "--generation-config": "vllm",  # none of the model's own sampling settings
        }
        return [
            *(part for pair in given.items() for part in pair),
            "--skip-tokenizer-init",
            "--enable-scale-out",  # token ids in, token ids out
            *self._transfer.arguments(),
            *(["--enable-sleep-mode"] if options.sleep else []),
            *options.arguments,
        ]

    def _environment(self, replica: int) -> dict[str, str]:
        return {**self._transfer.environment(), **_environment(self._options, replica)}

    # -- agreement of ranks ------------------------------------------------------------------------
    def _from_main(self, make: Callable[[], Value]) -> Value:
        """What ``make`` gives rank 0, on every rank; its error is raised on all of them."""
        return from_one(self.policy.engine.layout.is_main, make, self._share)

    def _told(self, failure: Exception | None, seconds: float, size: int) -> Exception | None:
        """What kept rank 0 from sending weights; how long that took and how much it was goes to the log."""
        own = (None if failure is None else sendable(failure), seconds, size)
        found: tuple[Exception | None, float, int] = self._share(own)
        self._sent["weights/seconds"] += found[1]
        self._sent["weights/bytes"] += found[2]
        return found[0]

    def _share(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective over the world."""
        engine = self.policy.engine
        return engine.gather_over_data(engine.broadcast_in_replica(value))[0]


def _absolute(path: str | Path) -> str:
    """As the server finds it, which works elsewhere. A link stays: an environment's Python is one."""
    return str(local(path).absolute())


def _environment(options: VllmConfig, replica: int) -> dict[str, str]:
    """Variables of a server. Raises ``ValueError`` for ``env:NAME`` and ``file:PATH`` that are not there."""
    return revealed("rollout.vllm.environment", options.environment_of(replica))
