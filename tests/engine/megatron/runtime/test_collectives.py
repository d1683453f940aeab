"""Sums and copies of shards over several gloo ranks, each a thread of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor

from gapo_mega.engine.megatron.runtime import collectives
from gapo_mega.engine.megatron.runtime.cpu import megatron_device

CHUNK = 1 << 17  # elements of float32
RANKS = (1, 2, 3, 4)
# No element, one chunk and the edges around it, and many chunks.
LENGTHS = (0, 1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 17)


def on_ranks(ranks: int, work: Callable[[dist.ProcessGroup, int], None]) -> None:
    """Run ``work`` on every rank of a gloo group. Raises what one of them raises."""
    store = dist.HashStore()

    def run(rank: int) -> None:
        work(dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=60)), rank)

    with ThreadPoolExecutor(ranks) as pool:
        for done in [pool.submit(run, rank) for rank in range(ranks)]:
            done.result()


def numbers(ranks: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[ranks, ranks * length]``, each rank's input."""
    generator = torch.Generator().manual_seed(ranks + length)
    return torch.randn(ranks, ranks * length, generator=generator).to(dtype)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_has_its_part_of_the_sum(ranks: int, length: int) -> None:
    inputs = numbers(ranks, length)
    expected = inputs.double().sum(dim=0)
    given = inputs.clone()

    def work(group: dist.ProcessGroup, rank: int) -> None:
        own = slice(rank * length, (rank + 1) * length)
        collectives.reduce_scatter_tensor(given[rank, own], given[rank], group=group)

    on_ranks(ranks, work)
    # Sums of at most four float32 numbers: three roundings of the largest partial sum.
    bound = 3 * 2.0**-24 * inputs.double().abs().sum(dim=0)
    for rank in range(ranks):
        own = slice(rank * length, (rank + 1) * length)
        assert bool(((given[rank, own] - expected[own]).abs() <= bound[own]).all())
        # Nothing else of the input is written to.
        assert torch.equal(given[rank, : own.start], inputs[rank, : own.start])
        assert torch.equal(given[rank, own.stop :], inputs[rank, own.stop :])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
def test_sums_go_into_another_tensor_in_every_type(dtype: torch.dtype) -> None:
    ranks, length = 3, CHUNK + 5
    inputs = torch.randint(-40, 40, (ranks, ranks * length)).to(dtype)  # bf16 has these sums exactly, too
    outputs = torch.full((ranks, length), 7).to(dtype)
    given = inputs.clone()
    on_ranks(ranks, lambda group, rank: _sum(outputs[rank], given[rank], group))
    assert torch.equal(outputs.view(-1), inputs.sum(dim=0))
    assert torch.equal(given, inputs)


def _sum(output: Tensor, input: Tensor, group: dist.ProcessGroup) -> None:
    collectives.reduce_scatter_tensor(output, input, group=group)


def test_what_is_not_finite_stays_where_it_is() -> None:
    inputs = numbers(2, CHUNK)
    inputs[0, 5], inputs[1, 6], inputs[0, CHUNK + 7] = torch.nan, torch.inf, -torch.inf
    expected = inputs.sum(dim=0)  # of two numbers there is one order
    given = inputs.clone()
    outputs = torch.empty(2, CHUNK)
    on_ranks(2, lambda group, rank: _sum(outputs[rank], given[rank], group))
    assert torch.equal(outputs.view(-1).nan_to_num(3.0), expected.nan_to_num(3.0))
    assert int((~outputs.isfinite()).sum()) == 3


def test_sums_follow_one_another() -> None:
    """The chunks of one are not taken for those of the next, when some ranks run ahead."""
    ranks, length, times = 4, CHUNK // 2 + 3, 5
    inputs = numbers(ranks, length)
    outputs = torch.empty(times, ranks, length)
    given = inputs.clone()

    def work(group: dist.ProcessGroup, rank: int) -> None:
        for index in range(times):
            collectives.reduce_scatter_tensor(outputs[index, rank], given[rank], group=group)
            given[rank] *= 2  # changes what others get, if they still wait for it

    on_ranks(ranks, work)
    for index in range(times):
        torch.testing.assert_close(outputs[index], outputs[0] * 2**index, rtol=0, atol=0)
    torch.testing.assert_close(outputs[0].view(-1), inputs.sum(dim=0))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("ranks", "length"), [(1, 10), (2, CHUNK), (3, 2 * CHUNK + 1), (4, 7), (4, 0)])
def test_every_rank_has_all_parts(ranks: int, length: int, dtype: torch.dtype, in_place: bool) -> None:
    parts = (numbers(ranks, length)[0] * 50).abs().to(dtype).view(ranks, length)
    outputs = torch.zeros(ranks, ranks * length, dtype=dtype)

    def work(group: dist.ProcessGroup, rank: int) -> None:
        own = parts[rank]
        if in_place:
            own = outputs[rank, rank * length : (rank + 1) * length].copy_(parts[rank])
        collectives.all_gather_into_tensor(outputs[rank], own, group=group)

    on_ranks(ranks, work)
    for rank in range(ranks):
        assert torch.equal(outputs[rank].view(ranks, length), parts)


def test_megatron_exchanges_shards_this_way_on_the_cpu_alone() -> None:
    before = param_and_grad_buffer.dist_reduce_scatter_func, param_and_grad_buffer.dist_all_gather_func
    with megatron_device():
        assert param_and_grad_buffer.dist_reduce_scatter_func is collectives.reduce_scatter_tensor
        assert param_and_grad_buffer.dist_all_gather_func is collectives.all_gather_into_tensor
    after = param_and_grad_buffer.dist_reduce_scatter_func, param_and_grad_buffer.dist_all_gather_func
    assert after == before
    assert collectives.reduce_scatter_tensor not in before
