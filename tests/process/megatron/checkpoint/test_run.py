"""Checkpoints saved by four ranks in one layout, loaded in the same and in others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks.check_checkpoint import check
from tests.helpers.ranks.launch import launch

# Layouts are [tensor, pipeline] or [tensor, pipeline, virtual_pipeline]; data parallelism takes the rest of
# four ranks.
CASES: dict[str, dict[str, Any]] = {
    "TP2xDP2": {"save": [2, 1], "load": [[2, 2], [1, 1]]},
    "TP2xDP2-bf16": {"save": [2, 1], "load": [[1, 2]], "dtype": "bf16"},
    "TP2xDP2-plain-adam": {
        "save": [2, 1],
        "load": [[1, 2]],
        "optimizer": {"distributed": False},
        "stateful": True,
    },
    "PP2xDP2-tied": {"save": [1, 2], "load": [[2, 2]], "tied": True, "vocab": 260},
    "interleaved": {
        "save": [1, 2, 2],
        "load": [[2, 2, 2], [1, 1]],
        "layers": 4,
        "optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    },
    "TP2xDP2-background": {"save": [2, 1], "load": [[1, 2]], "background": True},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one launch."""
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = [("check_checkpoint", {**case, "directory": str(folder / name)}) for name, case in CASES.items()]
    return dict(zip(CASES, launch(4, jobs, folder), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_resharding_and_continuation(results: dict[str, dict[str, Any]], name: str) -> None:
    assert "error" not in results[name], results[name]["error"]
    check(CASES[name], results[name]["result"])
