"""The order in which the tool sweeps combinations."""

from __future__ import annotations

import itertools

import pytest

from tests.helpers.combinations.covering import covering_order, subsets


class TestOrder:
    """A product of six axes, of which some combinations do not exist."""

    ROWS = tuple(
        row
        for row in itertools.product("ab", "cd", "efg", "hi", "jk", "lmno")
        if not (row[0] == "a" and row[3] == "h")
    )

    @pytest.mark.parametrize("seed", [0, 1])
    def test_every_triple_is_met_early(self, seed: int) -> None:
        order, covering = covering_order(self.ROWS, seed)
        assert sorted(order) == list(range(len(self.ROWS)))
        wanted = {
            self._triple(row, axes) for row in self.ROWS for axes in itertools.combinations(range(6), 3)
        }
        head = [self.ROWS[index] for index in order[:covering]]
        assert wanted == {
            self._triple(row, axes) for row in head for axes in itertools.combinations(range(6), 3)
        }
        # No fewer than 3 x 4 x 2 can do: the three largest axes. Greedy needs at most twice that here.
        assert 24 <= covering <= 48 < len(self.ROWS) // 2

    @staticmethod
    def _triple(row: tuple[str, ...], axes: tuple[int, ...]) -> tuple[tuple[int, str], ...]:
        return tuple((axis, row[axis]) for axis in axes)

    def test_the_seed_decides_the_rest(self) -> None:
        first, again, other = (covering_order(self.ROWS, seed)[0] for seed in (3, 3, 4))
        assert first == again != other

    def test_subsets_are_numbered_without_gaps(self) -> None:
        numbers = subsets(self.ROWS, 2)
        assert numbers.shape == (len(self.ROWS), 15)
        assert sorted(set(numbers.flatten().tolist())) == list(range(int(numbers.max()) + 1))

    def test_none_and_few(self) -> None:
        assert covering_order([], 0) == ([], 0)
        order, covering = covering_order([("a", "x"), ("b", "x")], 0)
        assert sorted(order) == [0, 1] and covering == 2
