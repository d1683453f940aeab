"""Rollouts of servers over several ranks: weights bit by bit, and every rank goes the same way."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama

LAYOUTS: dict[str, dict[str, Any]] = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "DP2": {}}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rollouts")
    tiny_llama(folder / "model")
    jobs = [("check_rollouts", {"model": str(folder / "model"), "layout": own}) for own in LAYOUTS.values()]
    found = {}
    for name, outcome in zip(LAYOUTS, launch(2, jobs, folder), strict=True):
        assert "error" not in outcome, f"{name}: {outcome['error']}"
        found[name] = outcome["result"]
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_stream_of_weights_is_the_model_bit_by_bit_on_rank_0_alone(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    assert results[name]["different"] == []
    assert results[name]["alone"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_of_a_replica_have_one_rollout_and_replicas_have_their_own(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    first, second = (rank["tokens"] for rank in results[name]["ranks"])
    assert (first == second) == (name != "DP2")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_restarted_server_is_met_by_all_ranks_together(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    for rank in results[name]["ranks"]:
        assert rank["again"] == rank["tokens"] and rank["streams"] == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_rollouts_ahead_are_of_one_policy_on_all_ranks(results: dict[str, dict[str, Any]], name: str) -> None:
    """Lost responses of one replica are left out of all ranks' checkpoint, and drawn anew on all."""
    first, second = (rank["ahead"] for rank in results[name]["ranks"])
    for rank in (first, second):
        assert rank["staleness"] == [0, 1, 0, 1]
        assert rank["versions"] == [[0] * 4, [0] * 4, [2] * 4, [2] * 4]
        assert rank["kept"] == [["1"], [], ["3"], []]
    assert (first["tokens"] == second["tokens"]) == (name != "DP2")
    assert first["asked"] <= (2 if name == "DP2" else 1) * 4 * 5


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_rank_waits_for_one_that_has_failed(results: dict[str, dict[str, Any]], name: str) -> None:
    for rank in results[name]["ranks"]:
        refused, gone = rank["errors"]
        assert refused.startswith("ValueError http://127.0.0.1:") and "found status 400" in refused
        assert gone.startswith("ServerLost http://127.0.0.1:") and "within 1 s" in gone
