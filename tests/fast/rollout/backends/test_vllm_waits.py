"""How long the vLLM back end waits, for whom, and that no rank is in a collective meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gapo_mega.config import Config
from gapo_mega.config.parallel import ParallelConfig
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout import rounds
from gapo_mega.rollout.backends import Policy
from gapo_mega.rollout.backends.vllm import Vllm
from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.servers import client
from gapo_mega.rollout.servers.client import Patience, VllmServer
from gapo_mega.rollout.servers.lost import ServerLost
from tests.helpers.fake_engine import END
from tests.helpers.fake_runs import configuration
from tests.helpers.table_policy import TablePolicy
from tests.helpers.team import Member, Team
from tests.helpers.vllm_protocol import TableServer, table_server

SECONDS = 1.6  # that ranks wait for one another, in the place of half an hour
PAUSE = 0.3  # before each round, far below that on a busy machine too
LONG = 2.4  # a rollout


@pytest.fixture
def server() -> Iterator[TableServer]:
    with table_server() as running:
        yield running


def settings(tmp_path: Path, parallel: dict[str, Any] | None = None, **vllm: Any) -> Config:
    options = {"patience": 0, "start_timeout": 2, "timeout": 20, **vllm}
    rollout = {"backend": "vllm", "vllm": options}
    return configuration(tmp_path, rollout=rollout, parallel=parallel or {})


class OnTeam(TablePolicy):
    """A table whose responses never end before their last token, as the policy of a rank of a team."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.table[:, END] = -1e4
        self.layout = member.layout
        self.gather_over_data = member.gather_over_data  # type: ignore[method-assign]
        self.broadcast_in_replica = member.broadcast_in_replica  # type: ignore[method-assign]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.layout.is_main:
            yield "table", self.table


def test_a_rollout_may_take_longer_than_ranks_wait_for_one_another(
    server: TableServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second replica's responses take long; then weights wait for those of the first."""
    monkeypatch.setattr(rounds, "_FIRST", PAUSE)
    monkeypatch.setattr(rounds, "_FURTHER", PAUSE)
    with table_server() as second:
        config = settings(tmp_path, url=[server.url, second.url])
        short = ParallelConfig.model_construct(timeout_minutes=SECONDS / 60)
        config = config.model_copy(update={"parallel": short})
        changed = threading.Barrier(4, timeout=20)

        def work(member: Member) -> list[list[int]]:
            engine = OnTeam(member)
            rollouts = Vllm(Policy(engine, tmp_path, 0, (END,)), config)
            rollouts.update_weights()
            second.seconds_per_token = LONG / 4
            sampling, prompts = SamplingParameters(4), [[3, 5], [4 + member.layout.data_rank]]
            found = [
                recovered(engine, rollouts.update_weights, lambda: rollouts.generate(prompts, sampling, 1))
            ]
            changed.wait()
            second.seconds_per_token, server.seconds_per_token = 0.0, LONG / 4
            asked = rollouts.ask(prompts, sampling, 2)
            engine.learn(1)
            rollouts.update_weights()
            found.append(recovered(engine, rollouts.update_weights, asked.result))
            return [one.tokens_BT.tolist() for one in found]

        with caplog.at_level(logging.INFO):
            ranks = Team(4, 2, SECONDS).run(work)
    assert ranks[0] == ranks[1] != ranks[2] == ranks[3]
    lines = {record.getMessage() for record in caplog.records if "waits for" in record.getMessage()}
    limit = "(rollout.vllm.timeout: 20 s for each)"
    assert f"rank 2 waits for 2 of 2 responses of {second.url} {limit}" in lines
    assert f"the next weights wait: rank 0 waits for 2 of 2 responses of {server.url} {limit}" in lines


def test_a_connection_that_is_lost_late_in_a_response_is_made_again(
    server: TableServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience counts from the loss on, not from the question."""
    monkeypatch.setattr(client, "_BETWEEN_LOOKS", 0.1)
    asked = VllmServer(server.url, Patience(20, 0.3, 2))
    lost: list[str] = []

    def lose(path: str, content: Any) -> tuple[int, Any]:
        if lost:
            return 200, {"choices": [{"token_ids": [1]}]}
        lost.append(path)
        time.sleep(0.6)  # longer than the patience
        return 0, None

    server.fail = lose
    assert asked.generate([3], {}) == {"token_ids": [1]}


def test_a_server_that_hangs_is_not_asked_again_as_one_that_is_away(server: TableServer) -> None:
    asked: list[str] = []
    over = threading.Event()

    def hang(path: str, content: Any) -> tuple[int, Any]:
        asked.append(path)
        over.wait(20)
        return 0, None

    server.fail = hang
    with pytest.raises(ServerLost, match="found no answer"):
        VllmServer(server.url, Patience(1, 60, 2)).generate([3], {})
    over.set()
    assert asked == ["/inference/v1/generate"]


def test_a_server_that_starts_is_waited_for_and_the_log_says_so(
    server: TableServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: further looks find no server either, and say nothing."""
    monkeypatch.setattr(client, "_SILENT", 0.3)
    monkeypatch.setattr(client, "_BETWEEN_LOOKS", 0.1)
    further = iter(range(3))
    server.fail = lambda path, content: (
        (503, None) if not caplog.records or next(further, None) is not None else None
    )
    with caplog.at_level(logging.INFO):
        assert VllmServer(server.url, Patience(20, 0, 600)).wait_until_up(lambda: None, 600) == "default"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"rank 0 waits for a healthy server: {server.url}/health: found status 503 (")
    assert line.endswith(" s of 600 s)")


@pytest.mark.parametrize("name", ["timeout", "patience", "start_timeout"])
def test_no_wait_is_longer_than_ranks_wait_for_one_another(tmp_path: Path, name: str) -> None:
    url = "http://127.0.0.1:1"
    Vllm.check(settings(tmp_path, url=url, **{name: 1500}))
    Vllm.check(settings(tmp_path, {"timeout_minutes": 60}, url=url, **{name: 3000}))
    message = rf"^rollout.vllm.{name}: found 1501 with parallel.timeout_minutes 30, accepted: up to 1500 sec"
    with pytest.raises(ValueError, match=message):
        Vllm.check(settings(tmp_path, url=url, **{name: 1501}))
