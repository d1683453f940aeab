"""Weights by vLLM's engines ``nccl`` and ``ipc``: what servers are told, in which order, and how it ends.

The servers are small ones of the same protocol, and NCCL and CUDA IPC emulated; tests/gpu has the real ones.
"""

from __future__ import annotations

import base64
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.rollout.backends import Policy
from gapo_mega.rollout.backends.vllm import Vllm
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.rollout.servers.transfers import ipc, nccl
from gapo_mega.rollout.servers.transfers.nccl_library import NcclError
from tests.helpers.emulated_nccl import GROUPS, EmulatedCommunicator, EmulatedLibrary
from tests.helpers.fake_engine import END
from tests.helpers.fake_runs import configuration
from tests.helpers.table_policy import TablePolicy
from tests.helpers.vllm_protocol import TableServer

UPDATE = ["/pause?mode=abort", "/start_weight_update", *["/update_weights"] * 3, "/finish_weight_update"]
READY = ["/reset_prefix_cache", "/update_weight_version", "/resume"]
EXPORTED: dict[int, Tensor] = {}


class NcclServer(TableServer):
    """One worker with vLLM's engine ``nccl``, packed."""

    def _update(self, path: str, content: Any) -> tuple[int, Any]:
        if path == "/get_world_size":
            return 200, {"world_size": 1}
        if path == "/init_weight_transfer_engine":
            told = content["init_info"]
            assert told["packed"] and told["packed_num_buffers"] == 1
            self.group = GROUPS[base64.b64decode(told["nccl_unique_id_b64"])]
            self.group.join(told["rank_offset"], told["world_size"])
            return 200, {"message": "initialized"}
        if path == "/shutdown_weight_transfer_engine":
            return 200, {"message": "shut down"}
        return super()._update(path, content)

    def receive(self, update: dict[str, Any]) -> dict[str, np.ndarray]:
        return unpacked(update, self.group.receive)


class IpcServer(TableServer):
    """One worker with vLLM's engine ``ipc``, packed. ``workers``: what it says it has."""

    workers = 1

    def _update(self, path: str, content: Any) -> tuple[int, Any]:
        if path == "/get_world_size":
            return 200, {"world_size": self.workers}
        if path == "/init_weight_transfer_engine":
            assert content == {"init_info": {"packed": True}}
            return 200, {"message": "initialized"}
        return super()._update(path, content)

    def receive(self, update: dict[str, Any]) -> dict[str, np.ndarray]:
        (key,) = pickle.loads(base64.b64decode(update["ipc_handles_pickled"])).values()
        whole = EXPORTED[key].numpy().tobytes()
        assert len(whole) == sum(update["tensor_sizes"])
        return unpacked(update, lambda count: whole)


def unpacked(update: dict[str, Any], read: Any) -> dict[str, np.ndarray]:
    """Tensors out of packed bytes, where each begins after those before."""
    types = [np.dtype(name) for name in update["dtype_names"]]
    sizes = [math.prod(s) * t.itemsize for s, t in zip(update["shapes"], types, strict=True)]
    whole, found, start = read(sum(sizes)), {}, 0
    for name, shape, dtype, size in zip(update["names"], update["shapes"], types, sizes, strict=True):
        found[name] = np.frombuffer(whole[start : start + size], dtype).reshape(shape)
        start += size
    return found


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nccl, "NcclLibrary", EmulatedLibrary)
    monkeypatch.setattr(nccl, "Communicator", EmulatedCommunicator)
    monkeypatch.setattr(EmulatedCommunicator, "made", [])

    def export(packed: Tensor) -> dict[str, Any]:
        EXPORTED[len(EXPORTED)] = packed
        return {"GPU-1": len(EXPORTED) - 1}

    monkeypatch.setattr(ipc, "export", export)
    monkeypatch.setattr(ipc, "collect", EXPORTED.clear)
    yield
    assert all(made.group.aborted for made in EmulatedCommunicator.made), "none outlives an update"


@contextmanager
def serving(kind: type[TableServer]) -> Iterator[Any]:
    server = kind()
    try:
        yield server
    finally:
        server.close()


def backend(urls: list[str], tmp_path: Path, engine: TablePolicy, transfer: str, **options: Any) -> Vllm:
    vllm = {"url": urls, "patience": 0, "start_timeout": 2, "timeout": 20, "piece_mib": 1, **options}
    config = configuration(tmp_path, rollout={"backend": "vllm", "vllm": {**vllm, "transfer": transfer}})
    return Vllm(Policy(engine, tmp_path, 0, (END,)), config)


@pytest.mark.parametrize(
    ("transfer", "kind", "before", "after"),
    [
        ("nccl", NcclServer, ["/init_weight_transfer_engine"], ["/shutdown_weight_transfer_engine"]),
        ("ipc", IpcServer, ["/init_weight_transfer_engine"], []),
    ],
)
def test_weights_arrive_whole_and_again_after_a_change(
    tmp_path: Path, transfer: str, kind: type[TableServer], before: list[str], after: list[str]
) -> None:
    engine = TablePolicy()
    with serving(kind) as first, serving(kind) as second:
        rollouts = backend([first.url, second.url], tmp_path, engine, transfer)
        for _ in range(2):
            rollouts.update_weights()
            for server in (first, second):
                np.testing.assert_array_equal(server.table, engine.table.double().numpy())
                assert server.pieces == [["norm", "table"], ["large"], ["last"]]
                assert server.updating() == ["/get_world_size", *before, *UPDATE, *READY, *after]
                server.calls.clear()
                server.pieces.clear()
            engine.learn(1)
        assert not EXPORTED


@pytest.mark.parametrize(
    "path",
    ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"],
)
def test_a_server_that_refuses_is_named_and_nobody_waits_for_it(tmp_path: Path, path: str) -> None:
    engine = TablePolicy()
    with serving(NcclServer) as server:
        rollouts = backend([server.url], tmp_path, engine, "nccl")
        server.fail = lambda asked, content: (500, {"error": "NCCL lost"}) if asked == path else None
        with pytest.raises(ServerLost, match=rf"^{server.url}{path}: found status 500 and .*NCCL lost"):
            rollouts.update_weights()
        assert engine.streams == 1
        server.fail = lambda asked, content: None
        rollouts.update_weights()
        np.testing.assert_array_equal(server.table, engine.table.double().numpy())


@pytest.mark.parametrize("refused", [False, True])
def test_what_nccl_says_is_told_and_what_it_refuses_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    with serving(NcclServer) as server:
        rollouts = backend([server.url], tmp_path, TablePolicy(), "nccl")
        monkeypatch.setattr(EmulatedCommunicator, "error", NcclError("GPU 0 twice", refused=refused))
        with pytest.raises(ValueError if refused else ServerLost, match=rf"{server.url}.*NCCL: GPU 0 twice"):
            rollouts.update_weights()


def test_a_server_that_does_not_let_go_has_its_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(NcclServer) as server:
        rollouts = backend([server.url], tmp_path, TablePolicy(), "nccl")
        server.fail = lambda asked, content: (500, {"error": "busy"}) if "shutdown" in asked else None
        rollouts.update_weights()
    assert "busy" in caplog.text and "after its weights were taken" in caplog.text


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/update_weights"])
def test_a_wait_for_a_server_s_gpus_ends(tmp_path: Path, path: str) -> None:
    """It says that it is done, and never was there: NCCL alone would wait for ever."""
    with serving(NcclServer) as server:
        rollouts = backend([server.url], tmp_path, TablePolicy(), "nccl", timeout=0.5)
        server.fail = lambda asked, content: (200, {"message": "done"}) if asked == path else None
        with pytest.raises(
            ServerLost, match=rf"^{server.url}: found that it did not .* by NCCL within rollout.vllm.timeout"
        ):
            rollouts.update_weights()


def test_ipc_with_several_workers_is_refused_before_any_weight(tmp_path: Path) -> None:
    with serving(IpcServer) as server:
        server.workers = 4
        with pytest.raises(
            ValueError, match=rf"^rollout.vllm.transfer: found ipc with 4 workers of {server.url}"
        ):
            backend([server.url], tmp_path, TablePolicy(), "ipc").update_weights()
        assert "/start_weight_update" not in server.calls


def settings(**vllm: Any) -> dict[str, Any]:
    return {"rollout": {"backend": "vllm", "vllm": {"url": "http://other:1", **vllm}}}


def test_what_does_not_fit_a_transfer_is_refused(tmp_path: Path) -> None:
    Vllm.check(configuration(tmp_path, **settings(transfer="nccl")))  # needs no directory
    both = configuration(tmp_path, **settings(transfer="nccl", weights_directory="/shared"))
    with pytest.raises(
        ValueError, match=r"^rollout.vllm.weights_directory: found /shared with .*nccl, accept"
    ):
        Vllm.check(both)
    with pytest.raises(ValueError, match=r"^rollout.vllm.transfer: found ipc with .*other:1, accepted"):
        Vllm.check(configuration(tmp_path, **settings(transfer="ipc")))


def test_servers_of_the_run_s_own_have_gpus_of_their_own(tmp_path: Path) -> None:
    vllm = {"python": "/bin/true", "transfer": "nccl"}
    with pytest.raises(ValueError, match=r"^rollout.vllm.transfer: found nccl without CUDA_VISIBLE_DEVICES"):
        Vllm.check(configuration(tmp_path, rollout={"backend": "vllm", "vllm": vllm}))
    given = {**vllm, "environment": {"CUDA_VISIBLE_DEVICES": "1"}}
    Vllm.check(configuration(tmp_path, rollout={"backend": "vllm", "vllm": given}))


def test_memory_that_a_server_may_not_map_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "check_gpu", lambda engine: None)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(ValueError, match=r"^rollout.vllm.transfer: found ipc with expandable_segments in "):
        Vllm.check_here(configuration(tmp_path, **settings(transfer="ipc")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_a_machine_without_gpus_is_told_before_any_work(tmp_path: Path, transfer: str) -> None:
    with pytest.raises(ValueError, match=f"^rollout.vllm.transfer: found {transfer} without a CUDA device"):
        Vllm.check_here(configuration(tmp_path, **settings(transfer=transfer)))


def test_servers_are_started_for_their_transfer(tmp_path: Path) -> None:
    for transfer, engine in {"files": "gapo_files", "nccl": "nccl", "ipc": "ipc"}.items():
        rollouts = backend(["http://127.0.0.1:1"], tmp_path, TablePolicy(), transfer)
        arguments = rollouts._arguments(rollouts._options)
        place = arguments.index("--weight-transfer-config")
        assert arguments[place + 1] == f'{{"backend": "{engine}"}}'
        assert ("gapo_mega_vllm.Imported" in arguments) == (transfer == "files")
        # Its handles travel pickled, which vLLM reads where it is told to and nowhere else.
        assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in rollouts._environment(0)) == (transfer == "ipc")
