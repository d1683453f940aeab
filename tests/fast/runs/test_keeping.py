"""Which checkpoints go: by their number, or by their bytes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gapo_mega.config import CheckpointConfig
from gapo_mega.engine.base import Layout
from gapo_mega.runs.checkpoints import CheckpointFolder
from gapo_mega.runs.keeping import Keep

ALONE = Layout(world=1, rank=0, tensor=1, pipeline=1, data=1, data_rank=0, tensor_rank=0, pipeline_rank=0)


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        (Keep(2), [1, 2]),
        (Keep(9), []),
        (Keep(9, gigabytes=7.5), [1, 2]),  # 3 + 4
        (Keep(9, gigabytes=7.0), [1, 2]),
        (Keep(9, gigabytes=6.9), [1, 2, 3]),
        (Keep(1, gigabytes=10.0), []),  # in place of the count
        (Keep(9, gigabytes=0.5), [1, 2, 3]),  # never the newest
    ],
)
def test_surplus(keep: Keep, gone: list[int]) -> None:
    """Four checkpoints of 1, 2, 3 and 4 GB."""
    assert keep.surplus([1, 2, 3, 4], lambda step: step * 10**9) == gone
    assert keep.surplus([4], lambda step: step * 10**9) == []
    assert keep.surplus([], lambda step: step * 10**9) == []


def test_the_configuration_says_it() -> None:
    assert Keep.of(CheckpointConfig(keep=3)) == Keep(3)
    assert str(Keep.of(CheckpointConfig(keep_gb=20))) == "checkpoint.keep_gb 20"
    with pytest.raises(ValueError, match=r"^checkpoint\.keep: found 0, accepted: at least 1"):
        Keep(0)


def test_by_size_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files of 10 kB: three fit into 35 kB, and the best one stays beside them."""
    caplog.set_level(logging.INFO)
    folder = CheckpointFolder(tmp_path, Keep(1, gigabytes=35e-6), ALONE, lambda: None)
    for step in range(1, 6):
        folder.save(step, lambda directory: (directory / "a").write_bytes(bytes(10_000)) and None, kept=[1])
    assert folder.steps() == [1, 3, 4, 5]
    assert f"removed checkpoint {folder.path(2)} (checkpoint.keep_gb 3.5e-05)" in caplog.text
    folder.save(6, lambda directory: (directory / "a").write_bytes(bytes(60_000)) and None)
    assert folder.steps() == [6]  # larger than what may be kept, and the newest
