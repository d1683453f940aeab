"""An aggregator's memory over two processes: the same numbers on both, of the steps that were taken."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama

# Without the distributed optimizer every data rank adds up its own replica; with it, its own shard.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"name": "sgd", "distributed": False, "lr": 0.05}),
    ({}, {"name": "adam", "lr": 0.01}),
    ({"tensor": 2}, {"name": "adam", "lr": 0.01}),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("memory")
    tiny_llama(folder / "model")
    jobs = [
        ("check_memory", {"model": str(folder / "model"), "layout": layout, "optimizer": optimizer})
        for layout, optimizer in CASES
    ]
    return launch(2, jobs, folder)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_rank_remembers_the_same(results: list[dict[str, Any]], case: int) -> None:
    assert "error" not in results[case], results[case]["error"]
    found = results[case]["result"]
    assert found["skipped"] == [False, True, False] * 2
    for first, second in found["remembered"].values():
        assert first == second
        assert len(first["before"]) == 3 and all(square > 0 for square in first["before"])
