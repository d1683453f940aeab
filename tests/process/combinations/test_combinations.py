"""A handful of the combinations that ``make combinations`` runs, and what becomes of one that crashes."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.combinations.reference import write_models
from tests.helpers.combinations.running import Outcome, Sweep
from tests.helpers.combinations.settings import AXES, Setting

FIRST = {axis: values[0] for axis, values in AXES.items()}
# Every value that means something on two ranks at least once, in pairs that test_layouts.py does not have.
CHANGES = [
    {
        "layout": "TP2",
        "sequence_parallel": "true",
        "forward": "shared",
        "microbatches": "several",
        "sampling": "edited",
    },
    {"layout": "TP2", "distributed": "true", "metric": "adam", "store": "single", "recompute": "full"},
    {
        "layout": "PP2",
        "tied": "true",
        "distributed": "true",
        "metric": "adam",
        "scope": "layers_0,2",
        "temperature": "0.7",
    },
    {"layout": "DP2", "overlap": "reduce", "scope": "last_block", "recompute": "selective"},
    {
        "layout": "PP2-interleaved",
        "microbatches": "several",
        "tied": "true",
        "dtype": "bf16",
        "recompute": "full",
        "sampling": "edited",
    },
    {
        "layout": "DP2",
        "distributed": "true",
        "overlap": "reduce_and_gather",
        "forward": "shared",
        "microbatches": "several",
    },
    {"layout": "DP2", "distributed": "true", "store_dtype": "bf16", "dtype": "bf16", "metric": "adam"},
    {"layout": "DP2", "distributed": "true", "microbatches": "packed", "forward": "one_pass"},
    {"layout": "CP2", "distributed": "true", "scope": "layers_0,2", "metric": "adam", "sampling": "edited"},
    {"model": "adapters", "layout": "DP2", "distributed": "true", "metric": "adam", "forward": "one_pass"},
    {
        "model": "experts",
        "layout": "DP2xEP2",
        "distributed": "true",
        "metric": "adam",
        "recompute": "full",
        "forward": "one_pass",
    },
    {
        "model": "experts",
        "layout": "TP2xEP2",
        "sequence_parallel": "true",
        "distributed": "true",
        "overlap": "reduce_and_gather",
        "forward": "shared",
        "microbatches": "several",
        "sampling": "edited",
    },
]


def sweep(folder: Path, settings: list[Setting]) -> dict[Setting, Outcome]:
    write_models(folder)
    outcomes: list[Outcome] = []
    Sweep(folder, outcomes.append, seconds=300).run(settings, workers=1)
    return {outcome.setting: outcome for outcome in outcomes}


def test_a_handful(tmp_path: Path) -> None:
    settings = [Setting(**{**FIRST, **change}) for change in CHANGES]
    refused = Setting(**{**FIRST, "layout": "TP2", "store": "single", "scope": "last_layer"})
    outcomes = sweep(tmp_path, [*settings, refused])
    assert outcomes.keys() == {*settings, refused}
    for setting in settings:
        assert outcomes[setting].error is None, outcomes[setting].error
        assert outcomes[setting].worst <= 1.0, outcomes[setting]
    # One that raises is told of, and the others run.
    assert outcomes[refused].failed and "gradients.scope" in str(outcomes[refused].error)


def test_no_time(tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    Sweep(tmp_path, outcomes.append, seconds=0).run([Setting(**FIRST)], workers=1)
    assert outcomes == []
