"""Resuming in another layout: all pairs of tensor, pipeline and data parallelism, and one rank alone."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.rank_runs import prepare, settings
from tests.helpers.ranks.check_layouts import check
from tests.helpers.ranks.launch import launch


def test_every_layout_goes_on_from_every_other_one(tmp_path: Path) -> None:
    """Parameters and optimizer state are equal, the next losses are the same, and the log goes on."""
    prepare(tmp_path)
    arguments = {"directory": str(tmp_path / "saved"), "config": settings(tmp_path, "run", steps=1)}
    (found,) = launch(2, [("check_layouts", arguments)], tmp_path)
    assert "error" not in found, found["error"]
    check(found["result"])
