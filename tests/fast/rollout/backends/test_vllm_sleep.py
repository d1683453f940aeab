"""Servers that free their memory between rollouts, and what is logged of sending weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.backends import Policy
from gapo_mega.rollout.backends.vllm import Vllm
from gapo_mega.rollout.servers.lost import ServerLost
from tests.helpers.fake_engine import END
from tests.helpers.fake_runs import configuration, trainer
from tests.helpers.metrics_log import VARYING, metrics
from tests.helpers.table_policy import TablePolicy
from tests.helpers.vllm_protocol import TableServer, table_server

BYTES = 4 * (3 + 42 * 42 + 400_000 + 1)  # of the tensors of ``TablePolicy``


@pytest.fixture
def server() -> Iterator[TableServer]:
    with table_server() as running:
        yield running


def rollout(url: str | list[str], **vllm: Any) -> dict[str, Any]:
    return {"backend": "vllm", "vllm": {"url": url, "patience": 0, "start_timeout": 2, **vllm}}


def backend(server: TableServer, tmp_path: Path, engine: TablePolicy, **vllm: Any) -> Vllm:
    config = configuration(tmp_path, rollout=rollout(server.url, **vllm))
    return Vllm(Policy(engine, tmp_path, 0, (END,)), config)


def logged(server: TableServer, directory: Path, *, sleep: bool, advantages: str) -> list[dict[str, Any]]:
    """What a run has in its log, times and what was sent aside."""
    run = trainer(
        directory,
        TablePolicy(),
        steps=3,
        rollout=rollout(server.url, sleep=sleep),
        advantages={"name": advantages},
        backend=Vllm,
    )
    assert run.run()
    return metrics(directory, (*VARYING, "weights/"))


@pytest.mark.parametrize("advantages", ["group", "remax"])
def test_a_run_whose_servers_sleep_is_the_run_whose_servers_do_not(
    server: TableServer, tmp_path: Path, advantages: str
) -> None:
    asleep = logged(server, tmp_path / "asleep", sleep=True, advantages=advantages)
    assert server.calls.count("/sleep?level=2") == 4  # after the held-out answers, and in every step
    assert server.asleep == {"weights", "kv_cache"}
    server.asleep = set()
    assert asleep == logged(server, tmp_path / "awake", sleep=False, advantages=advantages)
    assert server.calls.count("/sleep?level=2") == 4


def test_weights_come_after_their_memory_and_before_the_cache_s(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    rollouts = backend(server, tmp_path, engine, sleep=True)
    rollouts.update_weights()
    before = rollouts.generate([[4]], SamplingParameters(4), seed=1)
    rollouts.rest()
    rollouts.rest()  # has nothing to do
    server.calls.clear()
    rollouts.update_weights()  # of the same policy
    assert server.updating() == [
        *("/wake_up?tags=weights", "/pause?mode=abort", "/start_weight_update", "/update_weights"),
        *("/finish_weight_update", "/wake_up?tags=kv_cache"),
        *("/reset_prefix_cache", "/update_weight_version", "/resume"),
    ]
    after = rollouts.generate([[4]], SamplingParameters(4), seed=1)
    assert after.logprobs_BT.equal(before.logprobs_BT)


def test_a_server_that_does_not_sleep_ends_the_run(server: TableServer, tmp_path: Path) -> None:
    """Its memory is the training's."""
    rollouts = backend(server, tmp_path, TablePolicy(), sleep=True)
    rollouts.update_weights()
    server.fail = lambda path, content: (500, {"error": "busy"}) if "/sleep" in path else None
    with pytest.raises(ServerLost, match=rf"^{server.url}/sleep.*busy"):
        rollouts.rest()


def test_servers_that_answer_beside_the_training_never_sleep(tmp_path: Path) -> None:
    config = configuration(tmp_path, rollout={**rollout("http://localhost:1", sleep=True), "ahead": 1})
    with pytest.raises(
        ValueError, match=r"^rollout.vllm.sleep: found true with rollout.ahead 1, accepted: f"
    ):
        Vllm.check(config)


def test_what_was_sent_is_told_once(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    with table_server() as second:
        config = configuration(tmp_path, rollout=rollout([server.url, second.url]))
        rollouts = Vllm(Policy(engine, tmp_path, 0, (END,)), config)
        for _ in range(2):
            rollouts.update_weights()
        found = rollouts.figures()
        assert found["weights/bytes"] == 2 * BYTES and found["weights/seconds"] > 0
        assert rollouts.figures() == {"weights/seconds": 0, "weights/bytes": 0}


def test_the_log_has_what_was_sent_for_every_update(server: TableServer, tmp_path: Path) -> None:
    run = trainer(tmp_path, TablePolicy(), steps=3, rollout=rollout(server.url), backend=Vllm)
    assert run.run()
    assert [line["weights/bytes"] for line in metrics(tmp_path)] == [BYTES] * 3
    assert all(line["weights/seconds"] > 0 for line in metrics(tmp_path))
