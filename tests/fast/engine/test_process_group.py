"""The meeting of processes: announced, bounded, and explained where nobody comes."""

from __future__ import annotations

import logging
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from gapo_mega.engine import process_group


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = int(server.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free))
    return free


@pytest.mark.parametrize(("rank", "others"), [("0", "rank 1"), ("1", "rank 0")])
def test_who_is_missing_is_said_before_and_after_the_wait(
    port: int, rank: str, others: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process_group, "TIMEOUT", timedelta(seconds=0.6))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            ValueError, match=f"rank {rank} of 2 did not meet {others} at 127.0.0.1:{port}"
        ) as raised,
    ):
        process_group.start_process_group("gloo")
    assert "\n" not in str(raised.value) and not dist.is_initialized()
    (record,) = [r for r in caplog.records if r.name == process_group.__name__]
    assert (
        f"rank {rank} of 2 waits for {others} at 127.0.0.1:{port}, at most 0.01 minutes"
        in record.getMessage()
    )
    assert "unset RANK and WORLD_SIZE" in record.getMessage()


def test_variables_that_do_not_fit_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"^RANK: found '3' without WORLD_SIZE"):
        process_group.start_process_group("gloo")


def test_one_process_meets_nobody(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever address a launcher left behind."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "a-host-that-is-gone.invalid")
    process_group.start_process_group("gloo")
    try:
        total = torch.ones(1)
        dist.all_reduce(total)
        assert (dist.get_world_size(), total.item()) == (1, 1.0)
    finally:
        dist.destroy_process_group()
