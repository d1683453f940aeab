"""Every server gets its share, and the samples of a prompt stay together."""

from __future__ import annotations

import pytest

from gapo_mega.rollout.servers.shares import servers_of

PROMPTS = [[1], [1], [2], [2], [3], [3], [1], [1]]


@pytest.mark.parametrize(
    ("servers", "data_ranks", "expected"),
    [
        ("a", 1, ["aaaaaaaa"]),
        ("ab", 1, ["aabbaabb"]),
        ("abc", 1, ["aabbccaa"]),
        ("ab", 2, ["aaaaaaaa", "bbbbbbbb"]),
        ("ab", 3, ["aaaaaaaa", "bbbbbbbb", "aaaaaaaa"]),
        ("abc", 2, ["aaccaacc", "bbbbbbbb"]),
        ("abcd", 2, ["aaccaacc", "bbddbbdd"]),
    ],
)
def test_servers_of_every_row(servers: str, data_ranks: int, expected: list[str]) -> None:
    found = ["".join(servers_of(PROMPTS, servers, rank, data_ranks)) for rank in range(data_ranks)]
    assert found == expected
    assert servers_of([], servers, 0, data_ranks) == []
