"""The benchmark of whole updates: its arithmetic on hand-made numbers, its arguments, and a tiny run."""

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
entries, figures, peers, plot = (
    importlib.import_module(name) for name in ("peer_entries", "peer_figures", "peers", "peer_plot")
)

TORCHJD = importlib.util.find_spec("torchjd") is not None


def entry(name: str, kind: str = "ours", **options: Any) -> Any:
    return entries.Entry(name, "ours", kind, options)


def test_gram_errors_are_shares_of_the_norms():
    reference = [[4.0, 1.0], [1.0, 100.0]]
    assert figures.gram_error(reference, reference) == 0.0
    assert figures.gram_error([[4.0, 1.2], [1.2, 100.0]], reference) == pytest.approx(0.2 / 20)
    assert figures.gram_error([[4.4]], reference) == pytest.approx(0.1)  # the first objective alone
    assert figures.gram_error([[float("nan"), 1.0], [1.0, 100.0]], reference) == float("inf")


def test_who_disagrees_is_stopped_and_a_peer_drops_out():
    reference = {"full": [[1.0, 0.0], [0.0, 1.0]], "last_layer": [[0.25, 0.0], [0.0, 0.25]]}
    off = {"gram": [[1.0, 0.01], [0.01, 1.0]]}
    with pytest.raises(RuntimeError, match=r"ours: its Gram matrix is off by 0\.01"):
        figures.agreement(entry("ours"), off, reference, tied=False)
    from_rows = {"gram": None, "exact": {"full": off["gram"]}}
    with pytest.raises(RuntimeError, match="autojac"):
        figures.agreement(entry("autojac", "autojac"), from_rows, reference, False)
    assert "off by 0.01" in figures.agreement(entry("g", "autogram"), off, reference, False)["failed"]
    # Each against the Gram matrix of the parameters that it is about.
    quarter = {"gram": reference["last_layer"]}
    found = figures.agreement(entry("ours", scope="last_layer"), quarter, reference, False)
    assert found == {"agreement": 0.0, "gram_error": 0.0}
    with pytest.raises(RuntimeError):
        figures.agreement(entry("ours"), quarter, reference, False)
    assert (
        figures.agreement(entry("ours", scope="last_layer"), off, reference, tied=True)["agreement"] is None
    )


def test_ratios_are_against_the_same_stack():
    def record(stack: str, kind: str, rounds: list[float], peak: int) -> dict[str, Any]:
        times = figures.times([(seconds, seconds / 10) for seconds in rounds])
        memory = {"allocated": {"peak_bytes": peak}, "resident": {"peak_bytes": 2 * peak}}
        return {"stack": stack, "kind": kind, **times, **memory}

    records = [
        record("hf", "single", [2.0, 1.0, 9.0], 100),
        record("ours", "single", [4.0, 4.0, 4.0], 200),
        record("hf", "autograd", [6.0, 4.0, 5.0], 140),
        record("ours", "ours", [6.0, 6.0, 6.0], 220),
        {"stack": "hf", "kind": "autogram", "failed": "no"},
    ]
    figures.add_ratios(records, gradient_bytes=20)
    assert [r.get("ratio") for r in records] == [1.0, 1.0, 2.5, 1.5, None]
    assert [r.get("least_ratio") for r in records] == [1.0, 1.0, 4.0, 1.5, None]
    assert records[2]["surplus"] == {"allocated": 2.0, "resident": 4.0}
    assert records[2]["optimizer_seconds"] == pytest.approx(0.5)


def test_scopes_name_parameters_of_transformers():
    names = ["model.embed_tokens.weight", "model.layers.0.x", "model.layers.1.x", "model.norm.weight"]
    names.append("lm_head.weight")

    def inside(scope: Any) -> list[int]:
        return [i for i, name in enumerate(names) if entries.in_scope(name, scope, layers=2)]

    assert inside("full") == [0, 1, 2, 3, 4]
    assert inside("last_layer") == [4]
    assert inside("last_block") == [2, 4]
    assert inside([[0, 1]]) == [1]


def test_arguments():
    assert peers.parse_strategies([]) == entries.known_strategies()
    assert peers.parse_strategies(["single", 'mine={"store_dtype": "bf16"}']) == {
        "single": {"store": "single", "forward": "separate"},
        "mine": {"store_dtype": "bf16"},
    }
    for wrong in ("other", "mine=", "mine=3", "mine={"):
        with pytest.raises(ValueError, match="strategy: found"):
            peers.parse_strategies([wrong])
    assert peers.parse_size("hidden=64,layers=2") == {"hidden": 64, "layers": 2}
    for wrong in ("width=3", "hidden=0", "hidden"):
        with pytest.raises(ValueError, match="size: found"):
            peers.parse_size(wrong)
    with pytest.raises(ValueError, match="leave_out: found 'nobody'"):
        entries.entries({}, ["nobody"], torchjd=True)
    assert not {"autojac", "autogram"} & {e.kind for e in entries.entries({}, [], torchjd=False)}


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
