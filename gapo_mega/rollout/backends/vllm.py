"""vLLM in a process and an environment of its own, asked over its HTTP API (docs/rollouts.md)."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from urllib3.util import parse_url

from gapo_mega.config import Config, VllmConfig
from gapo_mega.credentials import revealed
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.files import local
from gapo_mega.rollout.backends.base import Policy, RolloutBackend
from gapo_mega.rollout.response_scores import sendable
from gapo_mega.rollout.servers.agreement import from_one
from gapo_mega.rollout.servers.client import Patience, VllmServer
from gapo_mega.rollout.servers.process import ServerProcess
from gapo_mega.rollout.servers.questions import Questions
from gapo_mega.rollout.servers.requests import Requests
from gapo_mega.rollout.servers.responses import Response, assemble
from gapo_mega.rollout.servers.shares import servers_of
from gapo_mega.rollout.servers.weight_files import default_folder, hand_over
from gapo_mega.stopping import StoppedWaiting
from gapo_mega.types import Generation

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
_ATTEMPTS = 2  # of an update of the weights; a server of ours is started again in between
_HERE = ("127.0.0.1", "localhost", "[::1]")
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
        self._patience = Patience(options.timeout, options.patience, options.start_timeout)
        self._servers: list[VllmServer] = []  # known to all ranks after the first update
        self._processes: list[ServerProcess] = []  # those of the servers, on rank 0 of a run that starts them
        self._run = uuid.uuid4().hex[:12]
        self._taken = -1  # the engine's ``changes`` that the servers have
        self._label = ""
        self._asked: list[_Asked] = []  # what has no result yet
        if options.python is not None and policy.engine.layout.is_main:
            python, arguments = _absolute(options.python), self._arguments(options)
            self._processes = [
                ServerProcess(python, arguments, _environment(options, replica))
                for replica in range(options.replicas)
            ]
            for process in self._processes:
                process.start()

    @classmethod
    def check(cls, config: Config) -> None:
        rollout = config.rollout
        if (rollout.vllm.python is None) == (not rollout.vllm.urls):
            found = "neither" if rollout.vllm.python is None else "both"
            raise ValueError(
                f"rollout.vllm: found {found} of python and url with rollout.backend vllm, accepted: one of "
                "them (the Python of an environment with vLLM, or where servers answer)"
            )
        if rollout.top_p != 1.0 and not rollout.top_k:
            raise ValueError(
                f"rollout.top_p: found {rollout.top_p} with rollout.backend vllm and no rollout.top_k, "
                "accepted: 1, or a top_k beside it (the trainer must know which tokens were left to draw "
                "from, and an answer names few)"
            )
        for url in rollout.vllm.urls:
            if rollout.vllm.weights_directory is None and parse_url(url).host not in _HERE:
                raise ValueError(
                    f"rollout.vllm.weights_directory: found none with rollout.vllm.url {url}, accepted: a "
                    "directory that the server reads under the same path"
                )

    @classmethod
    def check_here(cls, config: Config) -> None:
        python = config.rollout.vllm.python
        if python is not None:
            _check_python(python)
        for replica in range(config.rollout.vllm.replicas):
            _environment(config.rollout.vllm, replica)

    # -- weights -----------------------------------------------------------------------------------
    def update_weights(self) -> None:
        """Raises ``ServerLost`` on all ranks where a server does not come or does not take the weights."""
        engine = self.policy.engine
        version = engine.changes
        if not self._servers:
            urls, self._run = self._from_main(lambda: (self._urls(), self._run))
            self._servers = [VllmServer(url, self._patience) for url in urls]
        label = f"{self._run}-{version}"
        for attempt in range(1, _ATTEMPTS + 1):
            stale = self._from_main(lambda: self._stale(label))
            if not stale:
                break
            self._settle()
            failure = self._send(stale, label)
            if failure is not None and (attempt == _ATTEMPTS or self._options.python is None):
                raise failure
        self._taken, self._label = version, label

    def _settle(self) -> None:
        """Wait until no rank has a request under way: an update drops those, or mixes their weights."""
        for asked in self._asked:
            asked.wait()
        self.policy.engine.barrier()

    def _urls(self) -> list[str]:
        return [process.url for process in self._processes] or self._options.urls

    def _stale(self, label: str) -> list[int]:
        """Numbers of the servers that have other weights, once all of them answer."""
        for process in self._processes:
            process.start()
        for server in self._servers:
            server.wait_until_up(self._check_processes, self._patience.start)
        for process in self._processes:
            process.answered = True
        return [i for i, server in enumerate(self._servers) if server.version() != label]

    def _check_processes(self) -> None:
        for process in self._processes:
            process.check()

    def _send(self, stale: Sequence[int], label: str) -> Exception | None:
        """Stream the weights to these servers. Returns on all ranks what kept one from taking them."""
        tensors = self.policy.engine.named_weights()
        if not self.policy.engine.layout.is_main:
            for _ in tensors:
                raise AssertionError("only rank 0 receives tensors")
            return self._told(None)
        failure: Exception | None = None
        begun = time.perf_counter()
        try:
            size = self._stream([self._servers[i] for i in stale], tensors, label)
            logger.debug("weights: %d bytes in %.2f s", size, time.perf_counter() - begun)
        except Exception as error:
            failure = error
            for i in stale if self._processes else []:
                self._processes[i].kill()  # its weights are in pieces
        return self._told(failure)

    def _stream(
        self, servers: Sequence[VllmServer], tensors: Iterator[tuple[str, Tensor]], label: str
    ) -> int:
        """The bytes that were sent. ``tensors`` come to their end, whatever a server does."""
        begun = False

        def take(path: str) -> None:
            nonlocal begun
            if not begun:
                for server in servers:
                    server.begin()
                begun = True
            for server in servers:
                server.take(path)

        given = self._options.weights_directory
        folder = default_folder() if given is None else _absolute(given)
        size = hand_over(tensors, self._options.piece_mib << 20, folder, take)
        for server in servers:
            server.finish(label)
        return size

    # -- answering ---------------------------------------------------------------------------------
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> Generation:
        """Raises ``ServerLost``, or what went wrong otherwise, on all ranks of the replica alike."""
        return self.ask(prompts, sampling, seed).result()

    def ask(self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int) -> _Asked:
        asked = _Asked(self, prompts, self._requests(prompts, sampling, seed), self._taken)
        self._asked.append(asked)
        return asked

    def forget(self, asked: _Asked) -> None:
        """Whose requests are at their end, or are not waited for."""
        if asked in self._asked:
            self._asked.remove(asked)

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

        return Requests(ask, len(prompts), self.config.rollout.batch_size)

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
            "--worker-extension-cls": "gapo_mega_vllm.TakesWeights",
        }
        return [
            *(part for pair in given.items() for part in pair),
            "--skip-tokenizer-init",
            "--enable-scale-out",  # token ids in, token ids out
            *options.arguments,
        ]

    # -- agreement of ranks ------------------------------------------------------------------------
    def _from_main(self, make: Callable[[], Value]) -> Value:
        """What ``make`` gives rank 0, on every rank; its error is raised on all of them."""
        return from_one(self.policy.engine.layout.is_main, make, self._share)

    def _told(self, failure: Exception | None) -> Exception | None:
        found = self._share(None if failure is None else sendable(failure))
        assert found is None or isinstance(found, Exception)
        return found

    def _share(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective over the world."""
        engine = self.policy.engine
        return engine.gather_over_data(engine.broadcast_in_replica(value))[0]


class _Asked:
    """Responses of one replica, which its first rank asks for."""

    def __init__(
        self, backend: Vllm, prompts: Sequence[Sequence[int]], requests: Requests | None, version: int
    ) -> None:
        """``requests``: of the replica's first rank. ``version``: of the weights that draw."""
        self._backend = backend
        self._prompts = prompts
        self._requests = requests
        self._version = version
        self.seconds = 0.0

    def wait(self, seconds: float | None = None) -> bool:
        return self._requests is None or self._requests.wait(seconds)

    def result(self) -> Generation:
        share = self._backend.policy.engine.broadcast_in_replica
        try:
            generation, self.seconds = from_one(self._requests is not None, self._generation, share)
        except StoppedWaiting:  # the requests go on
            raise
        except Exception:
            self._backend.forget(self)
            raise
        self._backend.forget(self)
        return generation

    def abandon(self) -> None:
        self._backend.forget(self)
        if self._requests is not None:
            self._requests.abandon()

    def _generation(self) -> tuple[Generation, float]:
        assert self._requests is not None
        policy = self._backend.policy
        responses = self._requests.responses()
        versions_B = torch.full((len(self._prompts),), self._version)
        generation = assemble(self._prompts, responses, policy.pad_id, policy.eos_ids, versions_B)
        return generation, self._requests.seconds


def _absolute(path: str | Path) -> str:
    """As the server finds it, which works elsewhere. A link stays: an environment's Python is one."""
    return str(local(path).absolute())


def _environment(options: VllmConfig, replica: int) -> dict[str, str]:
    """Variables of a server. Raises ``ValueError`` for ``env:NAME`` and ``file:PATH`` that are not there."""
    return revealed("rollout.vllm.environment", options.environment_of(replica))


def _check_python(python: str) -> None:
    if not local(python).is_file():
        raise ValueError(
            f"rollout.vllm.python: file {python} not found, accepted: the Python of an environment with vLLM "
            "(docs/rollouts.md)"
        )
    everywhere = os.environ.get("WORLD_SIZE")
    here = os.environ.get("LOCAL_WORLD_SIZE", everywhere)
    if here != everywhere:
        raise ValueError(
            f"rollout.vllm.python: found {python} in a job of {everywhere} processes, {here} of them on this "
            "machine; accepted: rollout.vllm.url (a server that the run starts answers on its machine alone)"
        )
