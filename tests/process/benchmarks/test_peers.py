"""The benchmark of whole updates: a tiny run, and an argument that is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
# A folder of scripts: its modules find each other there, and only there.
sys.path.insert(0, str(BENCHMARKS))
entries = importlib.import_module("peer_entries")

TORCHJD = entries.has_torchjd()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny run from the command line: one contender of each kind."""
    folder = tmp_path_factory.mktemp("peers")
    shown = (*entries.HF_ENTRIES[:2], *entries.TORCHJD_ENTRIES[3:5])
    left_out = [e.name for e in (*entries.HF_ENTRIES, *entries.TORCHJD_ENTRIES) if e not in shown]
    size = "hidden=64,layers=2,vocabulary=2048,feed_forward=96,heads=4"
    done = subprocess.run(
        [
            *(
                sys.executable,
                str(BENCHMARKS / "peers.py"),
                "--size",
                size,
                "--threads",
                "1",
                "--rounds",
                "1",
            ),
            *("--sequences", "2", "--length", "12", "--objectives", "2", "--strategy", "separate"),
            *("--out", str(folder / "r.json"), "--plot", str(folder / "r.png")),
            *(argument for name in left_out for argument in ("--leave-out", name)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "one update, m = 2" in done.stdout
    assert (folder / "r.png").stat().st_size > 10_000
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return found


def test_a_tiny_run_has_everyone_and_everything(result: dict[str, Any]):
    records = {record["contender"]: record for record in result["records"]}
    expected = {entries.HF_SINGLE, entries.STACKED, entries.OURS_SINGLE, "ours, separate"}
    expected |= {"autojac UPGrad, frugal", "autogram"} if TORCHJD else set()
    assert set(records) == expected
    assert {"date", "device", "versions", "busy_before"} <= set(result["machine"])
    assert result["model"]["gradient_bytes"] == 4 * result["model"]["parameters"]
    for name, record in records.items():
        assert "failed" not in record, name
        assert record["agreement"] <= 1e-4
        assert len(record["round_seconds"]) == 1
        assert 0 < record["optimizer_seconds"] < record["seconds"] == record["least_seconds"]
        assert record["ratio"] > 0 and record["allocated"]["peak_bytes"] > 0
        assert record["resident"]["peak_bytes"] >= record["resident"]["built_bytes"] > 0
    assert records[entries.HF_SINGLE]["ratio"] == records[entries.OURS_SINGLE]["ratio"] == 1.0


def test_a_jacobian_takes_what_it_has_to(result: dict[str, Any]):
    """m rows where the step for one objective has one gradient; ours keeps m - 1 beside its buffer."""
    records = {record["contender"]: record for record in result["records"]}
    assert records[entries.STACKED]["surplus"]["allocated"] >= 1.0
    # A thread of gloo lets go of its copy of the first gradient whenever it is next scheduled: with passes
    # this short, perhaps after the second one's copy was made.
    assert 0.9 <= records["ours, separate"]["surplus"]["allocated"] <= 2.1


def test_a_wrong_argument_is_an_error_of_one_line():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "peers.py"), "--sequences", "3", "--microbatches", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "microbatches: found 2, accepted: a divisor of 3 sequences" in done.stderr
