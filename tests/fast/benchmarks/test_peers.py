"""The benchmark of whole updates: its arithmetic on hand-made numbers, and its arguments."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
# A folder of scripts: its modules find each other there, and only there.
sys.path.insert(0, str(BENCHMARKS))
entries, figures, peers = (
    importlib.import_module(name) for name in ("peer_entries", "peer_figures", "peers")
)


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
