"""Which errors of which rank end a rollout, and which repeat it."""

from __future__ import annotations

from typing import Any

import pytest

from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.rounds import Said
from gapo_mega.rollout.servers.lost import ServerLost
from tests.helpers.fake_engine import FakeEngine


class Beside(FakeEngine):
    """A rank beside one that tells of ``other``, an error by attempt or none."""

    def __init__(self, other: list[Exception | None]) -> None:
        super().__init__()
        self._other = other

    def gather_over_data(self, value: Any) -> list[Any]:
        return [value, Said(found=self._other.pop(0))]


def outcome(own: list[Exception | None], other: list[Exception | None]) -> tuple[object, int, int]:
    """What comes of it, how often the work was done, and how often weights were taken over."""
    done, updates, mine = 0, 0, list(own)

    def work() -> str:
        nonlocal done
        done += 1
        error = mine.pop(0)
        if error is not None:
            raise error
        return "answered"

    def update() -> None:
        nonlocal updates
        updates += 1

    try:
        found: object = recovered(Beside(list(other)), update, work)
    except Exception as error:
        found = error
    return found, done, updates


LOST, OTHER_LOST = ServerLost("mine is away"), ServerLost("yours is away")
REFUSED, OTHER_REFUSED = ValueError("too long"), ValueError("too short")


def test_nothing_is_repeated_where_nothing_is_lost() -> None:
    assert outcome([None], [None]) == ("answered", 1, 0)


@pytest.mark.parametrize(("own", "other"), [(LOST, None), (None, OTHER_LOST), (LOST, OTHER_LOST)])
def test_all_ranks_repeat_what_one_of_them_has_lost(own: Exception | None, other: Exception | None) -> None:
    assert outcome([own, None], [other, None]) == ("answered", 2, 1)


def test_the_third_loss_is_the_last() -> None:
    assert outcome([LOST] * 3, [None] * 3) == (LOST, 3, 2)
    assert outcome([None] * 3, [OTHER_LOST] * 3) == (OTHER_LOST, 3, 2)


@pytest.mark.parametrize(
    ("own", "other", "told"),
    [
        (REFUSED, None, REFUSED),
        (None, OTHER_REFUSED, OTHER_REFUSED),
        (REFUSED, OTHER_LOST, REFUSED),
        (LOST, OTHER_REFUSED, OTHER_REFUSED),  # repeating would wait for a rank that has left
        (REFUSED, OTHER_REFUSED, REFUSED),
    ],
)
def test_another_error_of_any_rank_ends_it_on_all(
    own: Exception | None, other: Exception | None, told: Exception
) -> None:
    assert outcome([own], [other]) == (told, 1, 0)
