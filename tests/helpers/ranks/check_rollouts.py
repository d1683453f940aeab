"""Rollouts of a server on several ranks: the stream of weights, and what the ranks agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from gapo_mega.config import Config
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.rollout.ahead import Ahead, Steps
from gapo_mega.rollout.backends import Policy
from gapo_mega.rollout.backends.vllm import Vllm
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.types import Generation, Prompt
from tests.helpers.fake_engine import FakeTokenizer
from tests.helpers.ranks import check_engine
from tests.helpers.table_policy import TablePolicy
from tests.helpers.vllm_protocol import TableServer

PROMPTS = [[3, 5], [4], [3, 5]]
SAMPLING = SamplingParameters(8)


class TableOnRanks(TablePolicy):
    """A table as the policy of these ranks: rank 0 has the tensors, and all take part in the stream."""

    def __init__(self, engine: MegatronEngine) -> None:
        super().__init__()
        self._engine = engine
        self.layout = engine.layout
        self.barrier = engine.barrier  # type: ignore[method-assign]
        self.broadcast_in_replica = engine.broadcast_in_replica  # type: ignore[method-assign]
        self.gather_over_data = engine.gather_over_data  # type: ignore[method-assign]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.streams += 1
        for name, tensor in (("table", self.table), ("last", torch.ones(400_000))):
            self._engine.barrier()  # as a gather over ranks: all must come
            if self.layout.is_main:
                yield name, tensor


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, layout.

    Gives ``different``, names of tensors that the stream changed or lacks; ``alone``, whether rank 0 was the
    only one to get any; and by ranks what a rollout gave (``tokens``), one in which the server was restarted
    (``again``), what rollouts ahead gave (``ahead``), and the errors of one that it refused and one without a
    server (``errors``).
    """
    engine = check_engine.build_engine(check_engine.make_config(arguments["model"], arguments["layout"], {}))
    stream = {name: tensor.clone() for name, tensor in engine.named_weights()}
    everything: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everything, len(stream))
    original = load_file(Path(arguments["model"]) / "model.safetensors")
    different = sorted(
        name
        for name in original.keys() | stream.keys()
        if name not in original or name not in stream or not torch.equal(original[name], stream[name])
    )
    rollouts = _rollouts(engine)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, rollouts)
    return {"different": different, "alone": everything[0] > 0 and not any(everything[1:]), "ranks": found}


def _rollouts(engine: MegatronEngine) -> dict[str, Any]:
    policy, layout = TableOnRanks(engine), engine.layout
    server = TableServer() if layout.is_main else None
    url = engine.gather_over_data(engine.broadcast_in_replica(server.url if server else None))[0]
    vllm = {"url": url, "patience": 0, "start_timeout": 1, "piece_mib": 1}
    config = Config.model_validate(
        {
            **{"output_dir": "unused", "model": {"path": "unused"}, "data": {"source": "unused"}},
            **{
                "rollout": {"backend": "vllm", "vllm": vllm},
                "objectives": [{"name": "a", "function": "m:f"}],
            },
        }
    )
    backend = Vllm(Policy(policy, Path("unused"), 0, (1,)), config)

    def ask() -> Generation:
        return backend.generate(PROMPTS, SAMPLING, seed=7 + layout.data_rank)

    def rollout() -> Generation:
        return recovered(policy, backend.update_weights, ask)

    backend.update_weights()
    tokens = rollout().tokens_BT.tolist()
    if server is not None:
        asked = server.generated

        def restart(path: str, content: Any) -> None:
            if "generate" in path and server.generated == asked + 2:
                server.label = "default"

        server.fail = restart  # type: ignore[assignment]
    engine.barrier()
    again, streams, errors = rollout().tokens_BT.tolist(), policy.streams, []
    ahead = _ahead(policy, backend, server)
    if server is not None:
        refused = 400, {"error": "too long"}
        server.fail = lambda path, content: refused if "generate" in path else None
    engine.barrier()
    for _ in range(2):
        try:
            rollout()
        except (ValueError, ServerLost) as error:
            errors.append(f"{type(error).__name__} {error}")
        engine.barrier()
        if server is not None:
            server.close()
        engine.barrier()
    return {"tokens": tokens, "again": again, "streams": streams, "ahead": ahead, "errors": errors}


def _ahead(policy: TableOnRanks, backend: Vllm, server: TableServer | None) -> dict[str, Any]:
    """Four steps drawn ahead, with an update after each; responses of the third are lost on the last replica.

    Gives tokens, staleness and version by step, and which steps a checkpoint had after each.
    """
    layout, asked = policy.layout, len(server.asked) if server else 0
    mine = [Prompt(0, "a", (3 + layout.data_rank, 5)), Prompt(1, "b", (4, 6 + layout.data_rank))]
    collector = Collector(backend, FakeTokenizer(), SAMPLING)  # type: ignore[arg-type]
    ahead = Ahead(policy, backend, collector, Steps(4, lambda _: mine, lambda step: step, 2), 1, _untimed)
    found: dict[str, Any] = {"tokens": [], "staleness": [], "versions": [], "kept": []}
    begun = policy.changes
    for step in range(4):
        if server is not None:
            server.seconds_per_token = 0.01  # so that updates of weights have something to wait for
            # Of the third step; the last replica's first prompt begins with another token than any other.
            server.fail = lambda path, content, step=step: (  # type: ignore[misc]
                (500, {"error": "lost"})
                if step == 1 and "generate" in path and content["token_ids"] == [2 + layout.data, 5]
                else None
            )
        policy.barrier()
        sampled = ahead.take(step)
        ahead.settle()
        policy.barrier()
        versions_B = sampled.rollout.versions_B
        assert versions_B is not None
        found["tokens"].append(sampled.rollout.tokens_BT.tolist())
        found["staleness"].append(sampled.facts["rollout/staleness"])
        found["versions"].append([version - begun for version in versions_B.tolist()])
        policy.learn(step + 1)
        found["kept"].append(list(ahead.state_dict(step + 1)["batches"]))
    if server is not None:
        found["asked"] = len(server.asked) - asked
    return found


@contextmanager
def _untimed(name: str) -> Iterator[None]:
    yield
