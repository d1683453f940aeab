"""Batches: rows selected, split and moved keep together in every tensor, and stay what they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gapo_mega.types import Experience, KeptTokens, TokenBatch, lone_surrogate, well_formed

ROWS = 5


def tokens() -> torch.Tensor:
    """Row ``b`` holds ``b`` at every position."""
    return torch.arange(ROWS)[:, None].expand(ROWS, 3).contiguous()


def kept() -> KeptTokens:
    """Row ``b`` keeps ``b`` tokens at position 1, of number ``b``, and one at position 2."""
    rows_B = torch.arange(ROWS)
    counts_BT = torch.stack([torch.zeros_like(rows_B), rows_B, torch.ones_like(rows_B)], dim=1)
    return KeptTokens(counts_BT, rows_B.int().repeat_interleave(counts_BT.sum(dim=1)))


def experience() -> Experience:
    """Every tensor holds its row's number, whatever the dimension of its rows."""
    number_BT = tokens().float()
    return Experience(
        tokens_BT=tokens(),
        response_mask_BT=tokens() > 1,
        group_B=torch.arange(ROWS),
        old_logprobs_BT=number_BT,
        ref_logprobs_BT=number_BT,
        scores_MB=torch.arange(ROWS).expand(2, ROWS).float(),
        token_rewards_MBT=number_BT.expand(2, ROWS, 3),
        kept=kept(),
    )


def rows_of(batch: TokenBatch) -> list[int]:
    """The rows that ``batch`` holds, alike in all its tensors."""
    rows: list[int] = batch.tokens_BT[:, 0].tolist()
    assert batch.response_mask_BT.tolist() == [[row > 1] * 3 for row in rows]
    if isinstance(batch, Experience):
        wide = [[float(row)] * 3 for row in rows]
        assert batch.group_B.tolist() == rows
        assert batch.old_logprobs_BT.tolist() == batch.ref_logprobs_BT.tolist() == wide
        assert batch.scores_MB.tolist() == [rows, rows]
        assert batch.token_rewards_MBT.tolist() == [wide, wide]
        assert batch.values_MBT is batch.advantages_MBT is batch.returns_MBT is None
        assert batch.kept is not None
        assert batch.kept.counts_BT.tolist() == [[0, row, 1] for row in rows]
        assert batch.kept.tokens_K.tolist() == [row for row in rows for _ in range(row + 1)]
    return rows


def test_kept_tokens_at_some_positions() -> None:
    everything = kept()
    mask_BT = torch.zeros(ROWS, 3, dtype=torch.bool)
    mask_BT[3, 1] = mask_BT[4, 2] = True
    found = everything.where(mask_BT)
    assert found.counts_BT.tolist() == [[0, 0, 0]] * 3 + [[0, 3, 0], [0, 0, 1]]
    assert found.tokens_K.tolist() == [3, 3, 3, 4]


@pytest.mark.parametrize("batch", [TokenBatch(tokens(), tokens() > 1), experience()])
def test_rows_stay_together(batch: TokenBatch) -> None:
    assert batch.batch_size == ROWS
    chosen = batch.select(torch.tensor([3, 0, 3]))
    assert type(chosen) is type(batch) and rows_of(chosen) == [3, 0, 3]
    pieces = batch.split(2)
    assert [rows_of(piece) for piece in pieces] == [[0, 1], [2, 3], [4]]
    assert {type(piece) for piece in pieces} == {type(batch)}
    assert rows_of(batch) == [*range(ROWS)]
    assert batch.select(torch.zeros(0, dtype=torch.int64)).batch_size == 0


def test_cutting_takes_the_columns_of_every_tensor_that_has_some() -> None:
    whole = experience()
    mask_BT = torch.zeros(ROWS, 3, dtype=torch.bool)
    mask_BT[1, 0] = mask_BT[3, 1] = True
    whole = dataclasses.replace(
        whole,
        response_mask_BT=mask_BT,
        kept=KeptTokens(mask_BT.long(), torch.tensor([7, 8], dtype=torch.int32)),
    )
    assert whole.lengths_B.tolist() == [1, 1, 1, 2, 1]
    cut = whole.cut(2)
    assert cut.tokens_BT.shape == cut.response_mask_BT.shape == cut.old_logprobs_BT.shape == (ROWS, 2)
    assert cut.token_rewards_MBT.shape == (2, ROWS, 2)
    assert cut.scores_MB.shape == (2, ROWS) and cut.group_B.shape == (ROWS,)
    assert cut.kept is not None and cut.kept.counts_BT.shape == (ROWS, 2)
    assert cut.kept.select(torch.tensor([3])).tokens_K.tolist() == [8]
    with pytest.raises(AssertionError):
        whole.cut(1)


def test_moving_takes_every_tensor_along() -> None:
    moved = experience().to(torch.device("meta"))
    assert moved.kept is not None
    tensors = [*vars(moved).values(), *vars(moved.kept).values()]
    assert {value.device.type for value in tensors if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.returns_MBT is None and moved.tokens_BT.shape == (ROWS, 3)


def test_minibatches_cover_every_row_once() -> None:
    whole = experience().select(torch.arange(4))
    parts = [rows_of(part) for part in whole.minibatches(2, torch.Generator().manual_seed(0))]
    assert sorted(row for part in parts for row in part) == [0, 1, 2, 3] and {len(p) for p in parts} == {2}
    with pytest.raises(ValueError, match=r"^algorithm.minibatches: found 3, which does not divide the 4 seq"):
        next(whole.minibatches(3, torch.Generator()))


@pytest.mark.parametrize(
    "text", ["", "plain", "na\u00efve \u6771\u4eac \U0001f327", "\x00", "\ufeffa", "\u2028"]
)
def test_text_that_has_utf_8_stays_as_it_is(text: str) -> None:
    assert well_formed(text) == text and lone_surrogate(text) is None


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("a\ud800", 1, "a\ufffd"),
        ("\udc80b", 0, "\ufffdb"),
        ("\ud800\ud800x", 0, "\ufffd\ufffdx"),
        ("xy\udfff\ud800", 2, "xy\ufffd\ufffd"),
    ],
)
def test_half_characters_are_replaced(text: str, place: int, expected: str) -> None:
    assert lone_surrogate(text) == place
    assert well_formed(text) == expected
    well_formed(text).encode("utf-8")


def test_two_halves_are_the_character() -> None:
    assert well_formed("\ud83c\udf27") == "\U0001f327"
