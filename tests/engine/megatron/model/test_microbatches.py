"""Microbatches of like length: nothing is lost, nothing is wider than it must be, and order is restored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from gapo_mega import aggregation
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.model.microbatches import Microbatches
from gapo_mega.types import TokenBatch
from tests.helpers.logits import chosen_logprobs
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.tiny import tiny_llama

LENGTHS = [5, 2, 9, 5, 1, 7, 3]
WIDTH = 12


def batch_of(lengths: list[int]) -> TokenBatch:
    """Row ``b`` holds ``b``; every second token counts up to the last one."""
    column_T = torch.arange(1, WIDTH + 1)
    length_B1 = torch.tensor(lengths)[:, None]
    mask_BT = (column_T <= length_B1) & ((length_B1 - column_T) % 2 == 0)
    return TokenBatch(torch.arange(len(lengths))[:, None].expand(-1, WIDTH).contiguous(), mask_BT)


def test_pieces_are_as_wide_as_their_longest_row() -> None:
    pieces = Microbatches.of(batch_of(LENGTHS), 3)
    assert [part.tokens_BT[:, 0].tolist() for part in pieces.parts] == [[2, 5, 0], [3, 6, 1], [4]]
    assert [part.tokens_BT.shape[1] for part in pieces.parts] == [9, 5, 1]
    assert sum(int(part.response_mask_BT.sum()) for part in pieces.parts) == sum(
        (length + 1) // 2 for length in LENGTHS
    )
    assert pieces.computed == 3 * 9 + 3 * 5 + 1


def test_one_width_is_that_of_the_longest_row() -> None:
    pieces = Microbatches.of(batch_of(LENGTHS), 3, one_width=True)
    assert {part.tokens_BT.shape[1] for part in pieces.parts} == {9}


def test_pairs_stay_together() -> None:
    pieces = Microbatches.of(batch_of([3, 1, 4, 4, 1, 9]), 2, together=2)
    assert [part.tokens_BT[:, 0].tolist() for part in pieces.parts] == [[4, 5], [2, 3], [0, 1]]
    assert [part.tokens_BT.shape[1] for part in pieces.parts] == [9, 4, 3]


def test_outputs_come_back_in_the_rows_order() -> None:
    batch = batch_of(LENGTHS)
    pieces = Microbatches.of(batch, 2)
    expected_BT = batch.tokens_BT * (torch.arange(1, WIDTH + 1) <= torch.tensor(LENGTHS)[:, None])
    outputs = [part.tokens_BT for part in pieces.parts]
    found_BT = pieces.rejoin(outputs)
    inside_BT = expected_BT != 0
    assert torch.equal(found_BT[inside_BT], expected_BT[inside_BT]) and found_BT.shape == (7, WIDTH)
    assert not found_BT[2, 9:].any()  # beyond the widest piece
    assert torch.equal(pieces.rejoin([part[None] for part in outputs], dim=1)[0], found_BT)
    assert pieces.rejoin_rows([part.tokens_BT[:, 0] for part in pieces.parts]).tolist() == list(range(7))


def test_no_rows_and_rows_without_any_token_that_counts() -> None:
    assert Microbatches.of(batch_of([]), 2).parts == []
    silent = TokenBatch(torch.ones(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.bool))
    (part,) = Microbatches.of(silent, 2).parts
    assert part.tokens_BT.shape == (2, 1)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[MegatronEngine]:
    tiny_llama(tmp_path / "model")
    sgd = {"name": "sgd", "distributed": False, "lr": 0.05}
    yield check_engine.build_engine(check_engine.make_config(str(tmp_path / "model"), {}, sgd))
    worlds.leave()


def test_the_engine_computes_no_column_behind_a_microbatchs_longest(
    engine: MegatronEngine, tmp_path: Path
) -> None:
    """And says of every row what transformers says, whatever order it took them in."""
    experience = check_engine.global_batch(200)
    ends = [max(row.nonzero()[:, 0].tolist()) + 1 for row in experience.response_mask_BT]
    assert ends != sorted(ends, reverse=True) and len(ends) == 8
    longest = sorted(ends, reverse=True)[::2]
    seen: list[tuple[int, ...]] = []
    for model in (engine.policy.modules[0], engine.reference.model):
        model.embedding.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    found_BT = engine.logprobs(experience, "reference")
    assert seen == [(2, width) for width in longest]
    seen.clear()
    report = engine.update_policy(experience, check_engine.loss, aggregation.build("gapo"))
    assert seen == [(2, width) for width in longest]
    assert report.padding == pytest.approx(2 * sum(longest) / sum(ends), rel=1e-12)

    tokens_BT, mask_BT = experience.tokens_BT, experience.response_mask_BT
    with torch.no_grad():
        logits_BTV = LlamaForCausalLM.from_pretrained(tmp_path / "model").double()(tokens_BT).logits
    expected_BT = torch.zeros(tokens_BT.shape, dtype=torch.float64)
    expected_BT[:, 1:] = chosen_logprobs(logits_BTV, tokens_BT)
    # fp32 through four layers.
    torch.testing.assert_close(found_BT.double(), expected_BT * mask_BT, rtol=1e-5, atol=1e-5)


def test_packed_rows_hold_what_fits() -> None:
    """By first fit of decreasing lengths 9 | 7, 2 | 5, 3, 1 | 5 in rows of 9."""
    pieces = Microbatches.packed(batch_of(LENGTHS), 9)
    rows = [part.tokens_BT[:, 0].tolist() for part in pieces.parts]
    assert rows == [[2], [5, 1], [0, 6, 4], [3]]
    assert [part.packed_width for part in pieces.parts] == [9, 9, 9, 5]
    assert [part.tokens_BT.shape[1] for part in pieces.parts] == [9, 7, 5, 5]
    assert pieces.computed == sum(LENGTHS)
    batch = batch_of(LENGTHS)
    found_BT = pieces.rejoin([part.tokens_BT * part.response_mask_BT for part in pieces.parts])
    assert torch.equal(found_BT, batch.tokens_BT * batch.response_mask_BT)


def test_packed_rows_are_as_many_and_as_wide_as_asked_for() -> None:
    for least in range(1, len(LENGTHS) + 3):
        pieces = Microbatches.packed(batch_of(LENGTHS), 100, least=least, multiple=4, one_width=True)
        assert len(pieces.parts) == min(least, len(LENGTHS))
        assert sorted(pieces.order_B.tolist()) == list(range(len(LENGTHS)))
        (width,) = {part.packed_width for part in pieces.parts}
        assert width == max(-(-int(part.lengths_B.sum()) // 4) * 4 for part in pieces.parts)
    assert Microbatches.packed(batch_of([]), 9, least=3, one_width=True).parts == []


@pytest.mark.parametrize("seed", range(5))
def test_packed_rows_are_no_more_than_the_plan_says(seed: int) -> None:
    """Every row but the last holds as many sequences as it would of the longest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH + 1, (40,), generator=generator).tolist()
    for most in (WIDTH, 30, 55):
        pieces = Microbatches.packed(batch_of(lengths), most)
        assert all(part.packed_width is not None and part.packed_width <= most for part in pieces.parts)
        assert len(pieces.parts) <= -(-len(lengths) // (most // max(lengths)))
