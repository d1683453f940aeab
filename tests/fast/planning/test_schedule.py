"""The order of a stage's passes: what is known of any schedule that works."""

from __future__ import annotations

import pytest

from gapo_mega.planning.schedule import microbatch_group, schedule


@pytest.mark.parametrize(
    ("microbatches", "pipeline", "group"),
    [(4, 2, 2), (2, 2, 2), (3, 2, 3), (5, 2, 3), (8, 3, 4), (6, 3, 3), (7, 4, 7), (9, 4, 5), (13, 4, 7)],
)
def test_groups_leave_as_many_as_stages_or_none(microbatches: int, pipeline: int, group: int) -> None:
    assert microbatch_group(microbatches, pipeline) == group


@pytest.mark.parametrize(("stage", "ahead"), [(0, 3), (1, 2), (2, 1)])
def test_without_chunks_a_stage_is_ahead_by_the_stages_behind(stage: int, ahead: int) -> None:
    assert list(schedule(3, 1, stage, 8)) == [(True, 0)] * ahead + [(False, 0)]
    assert list(schedule(3, 1, stage, 1)) == [(True, 0), (False, 0)]


def test_two_chunks_on_two_stages() -> None:
    """Figure 4 of Narayanan et al. (arXiv 2104.04473), for two stages with two chunks each."""
    forward, backward = (True, 0), (False, 1)
    last = list(schedule(2, 2, 1, 4))
    # Two microbatches through the first chunk, then the second chunk's forward and backward in turn.
    assert last[:6] == [forward, forward, (True, 1), backward, (True, 1), backward]
    first = list(schedule(2, 2, 0, 4))
    assert first[:4] == [forward, forward, (True, 1), (True, 1)]  # two more, for the stage behind
    assert first[4:6] == [forward, backward]


def test_no_more_passes_than_there_are() -> None:
    passes = list(schedule(2, 3, 0, 2))
    assert [number for forward, number in passes if forward] == [0, 0, 1, 1, 2, 2]
    assert [number for forward, number in passes if not forward] == [2, 2, 1, 1, 0, 0]
