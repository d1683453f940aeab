"""The whole path on a CUDA device: streams, threads, graphs, and nothing that waits."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega import aggregation, ops
from gapo_mega.ops import aggregate
from tests.helpers.aggregators import OnDevice
from tests.helpers.on_gpu import CHUNK, assert_gram_close, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_gramian_on_a_side_stream():
    rows = [normal(4 * CHUNK, 0, torch.float32, seed) for seed in range(2)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = ops.gramian(rows)
    stream.synchronize()
    assert_gram_close(found, rows)


METHODS = [
    ("gapo", {"p": 1}),
    ("gapo", {"p": 2, "scale": "mean_norm"}),
    ("mgda", {"scale": "sum_to_one"}),
    ("p_gapo", {"preference": [0.2, 0.3, 0.5]}),
    ("weighted_sum", {}),
]


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_aggregate_on_the_device_is_the_hosts(name, options):
    rows = [normal(2 * CHUNK + 5, 0, torch.float32, seed) for seed in range(3)]
    method = aggregation.build(name, **options)
    copies = [row.clone() for row in rows]
    found = ops.aggregate_(rows[2], rows, None, None, method)
    assert found.ok() and found.weights.device.type == "cuda"
    expected = method(found.gram.cpu())
    # Two math libraries evaluate the same formula.
    torch.testing.assert_close(found.weights.cpu(), expected, rtol=1e-12, atol=0)
    wanted = sum(w * row.double() for w, row in zip(expected.cuda(), copies, strict=True))
    torch.testing.assert_close(rows[2].double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_aggregate_waits_for_nothing(name, options):
    """Run the whole path under torch's own check for synchronising calls."""
    rows = [normal(2 * CHUNK, 0, torch.float32, seed) for seed in range(3)]
    method = aggregation.build(name, **options)
    ops.aggregate_(rows[2], rows, None, None, method)  # copies plan and constants to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.aggregate_(rows[2], rows, None, None, method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.ok()


def test_a_method_with_memory_waits_for_nothing():
    rows = [normal(2 * CHUNK, 0, torch.float32, seed) for seed in range(3)]
    method, expected = OnDevice(), OnDevice()
    method.commit(ops.aggregate_(rows[2], rows, None, None, method))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.aggregate_(rows[2], rows, None, None, method)
        method.commit(found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert method.before.device.type == "cuda"
    expected.before = 2 * (method.before.cpu() - found.gram.cpu().diagonal())  # commit halves the old value
    torch.testing.assert_close(found.weights.cpu(), expected(found.gram.cpu()), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_aggregate_in_a_cuda_graph(name, options):
    rows = [normal(3 * CHUNK, 0, torch.float32, seed) for seed in range(3)]
    segments = [(0, 100), (200, 3 * CHUNK)]
    out = torch.empty_like(rows[0])
    method = aggregation.build(name, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.aggregate_(out, rows, segments, None, method)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.aggregate_(out, rows, segments, None, method)
    for seed in (10, 20):
        for i, row in enumerate(rows):
            row.copy_(normal(3 * CHUNK, 0, torch.float32, seed + i))
        graph.replay()
        replayed = [tensor.clone() for tensor in (out, captured.gram, captured.weights)]
        fresh = torch.empty_like(out)
        again = ops.aggregate_(fresh, rows, segments, None, method)
        for mine, right in zip(replayed, (fresh, again.gram, again.weights), strict=True):
            assert torch.equal(mine, right)
        assert int(captured.status) == ops.Status.OK


def test_aggregate_with_nccl_in_a_cuda_graph(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rows = [normal(CHUNK, 0, torch.float32, seed) for seed in range(2)]
        out = torch.empty_like(rows[0])
        method = aggregation.build("gapo")
        expected = ops.aggregate_(out, rows, None, dist.group.WORLD, method).weights.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.aggregate_(out, rows, None, dist.group.WORLD, method)
        graph.replay()
        assert torch.equal(captured.weights, expected)
    finally:
        dist.destroy_process_group()


def test_nothing_is_allocated_after_warm_up_and_little_before():
    rows = [normal(1 << 22, 0, torch.float32, seed) for seed in range(8)]
    method = aggregation.build("gapo")
    ops.aggregate_(rows[7], rows, None, None, method)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    ops.aggregate_(rows[7], rows, None, None, method)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert torch.cuda.max_memory_allocated() - resident < 1 << 20


def test_constants_are_complete_for_every_stream(tmp_path):
    """A stream that is far behind makes the first call; another one uses what it left."""
    aggregate._triangle.cache_clear()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        gram = torch.arange(16.0, dtype=torch.float64, device="cuda").reshape(4, 4)
        expected = gram.triu() + gram.triu(1).T
        torch.cuda.synchronize()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(first):
            torch.cuda._sleep(10**9)
            ops.sum_gram_(gram.clone(), dist.group.WORLD)
        with torch.cuda.stream(second):
            found = ops.sum_gram_(gram.clone(), dist.group.WORLD)
        torch.cuda.synchronize()
        assert torch.equal(found, expected)
    finally:
        dist.destroy_process_group()


def test_two_streams_and_two_threads_share_nothing():
    rows = [[normal(40 * CHUNK, 0, torch.float32, 10 * i + seed) for seed in range(3)] for i in range(4)]
    expected = [ops.gramian(mine) for mine in rows]
    outs = [torch.empty_like(mine[0]) for mine in rows]
    torch.cuda.synchronize()
    found: list[list[ops.Aggregated]] = [[] for _ in rows]

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                found[i].append(ops.aggregate_(outs[i], rows[i], None, None, aggregation.build("gapo")))
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, right, out, results in zip(rows, expected, outs, found, strict=True):
        assert len(results) == 20
        assert all(torch.equal(result.gram, right) for result in results)
        wanted = sum(w * row.double() for w, row in zip(results[0].weights, mine, strict=True))
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_the_first_call_in_a_capture_says_that_it_must_come_before():
    rows = [
        normal(CHUNK + 4321, 0, torch.float32, seed) for seed in range(2)
    ]  # lengths that no other test has
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="in the capture, accepted: one before it"),
        torch.cuda.graph(graph),
    ):
        ops.gramian(rows)
    assert_gram_close(ops.gramian(rows), rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_callers_device_stays_and_gets_no_context():
    index = torch.cuda.device_count() - 1
    rows = [normal(CHUNK, 0, torch.float32, seed).to(f"cuda:{index}") for seed in range(2)]
    before = torch.cuda.current_device()
    seen: list[int] = []

    def work() -> None:
        ops.aggregate_(rows[1], rows, None, None, aggregation.build("gapo"))
        seen.append(torch.cuda.current_device())

    thread = threading.Thread(target=work)  # a thread of its own has device 0, and no context yet
    thread.start()
    thread.join()
    assert seen == [0] and torch.cuda.current_device() == before


def test_a_compiled_step_is_the_step():
    rows = [normal(3 * CHUNK, 0, torch.float32, seed) for seed in range(2)]
    method = aggregation.build("gapo")

    def step(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(a)
        return ops.aggregate_(out, [2 * a, b + 1], None, None, method).weights, 3 * out

    expected = step(*rows)
    found = torch.compile(step, backend="eager")(*rows)
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))
