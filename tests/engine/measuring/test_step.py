"""`gapo-mega benchmark step` on a tiny model: every strategy takes part, and its memory is what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gapo_mega.config.strategies import variants
from gapo_mega.measuring import step_report as report
from gapo_mega.measuring.step import BASELINE, StepBenchmark, check_names, contenders
from gapo_mega.models import HFDirectory
from gapo_mega.models.registry import shape_of
from tests.helpers.ranks import check_engine
from tests.helpers.resolved import resolved_run
from tests.helpers.tiny import tiny_llama

NAMES = [variant.name for variant in variants()]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("benchmark") / "model"
    tiny_llama(directory)
    config = check_engine.make_config(
        str(directory),
        {},
        # A large learning rate: were anything learned, objectives would run out of gradients. One that is not
        # distributed: gloo's copies for it are released where the meter cannot see it.
        {"name": "adam", "lr": 1e-2, "distributed": False},
        micro_batch_size=8,
        data={"source": "s", "max_prompt_tokens": 5},
        rollout={"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 7},
    )
    run = StepBenchmark(resolved_run(config), [3])
    run.run(rounds=5)
    yield {**report.circumstances(config, 1, 5), **run.result()}
    run.engine.close()


def test_every_strategy_took_part(result: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in result["strategies"]}
    assert list(rows) == [BASELINE, *NAMES]
    assert rows[BASELINE]["ratio"] == 1.0
    for row in rows.values():
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["passes_ratio"] > 0 and (row["name"] != BASELINE or row["passes_ratio"] == 1.0)
        assert 0 < sum(row["phases_seconds"].values()) <= 1.5 * row["seconds"]


def test_memory_is_counted_from_the_tensors(result: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in result["strategies"]}
    gradients = result["bytes"]["gradients"]
    assert result["bytes"]["parameters"] <= gradients <= 1.05 * result["bytes"]["parameters"]  # padding
    assert result["bytes"]["optimizer"] == pytest.approx(2 * gradients, rel=0.05)  # Adam's two moments
    assert rows["separate"]["row_bytes"] == 2 * gradients
    assert rows["separate, bf16 rows"]["row_bytes"] == gradients
    assert rows["single"]["row_bytes"] == rows[BASELINE]["row_bytes"] == 0
    assert rows["last_layer"]["row_bytes"] == 3 * 256 * 72 * 4  # the padded vocabulary times hidden
    # Graphs are let go of and rows are not copied: a step's own peak differs by activations only.
    for name, tolerance in (("separate", 0.02), ("single", 0.02), ("last_layer", 0.05)):
        assert rows[name]["peak_bytes"] == pytest.approx(rows[BASELINE]["peak_bytes"], rel=tolerance)
    # A graph that serves several backwards is kept through the first ones.
    assert rows["shared"]["peak_bytes"] > 1.03 * rows[BASELINE]["peak_bytes"]


def test_table_and_file(result: dict[str, Any], tmp_path: Path) -> None:
    report.write(tmp_path / "new" / "step.json", result)
    assert json.loads((tmp_path / "new" / "step.json").read_text())["strategies"] == result["strategies"]
    text = StringIO()
    report.print_table(result, Console(file=text, width=132))
    for row in result["strategies"]:
        assert row["name"] in text.getvalue()


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    report.check_target(tmp_path / "new" / "folder" / "step.json")
    assert not (tmp_path / "new").exists()
    for wrong in (tmp_path, tmp_path / "a file" / "step.json"):
        with pytest.raises(ValueError, match=r"^--out: found .*, accepted: a file in a folder"):
            report.check_target(wrong)
        with pytest.raises(ValueError, match=r"^--out: .* cannot be written"):
            report.write(wrong, {})


def test_what_the_layout_rules_out_is_left_out(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_llama(directory)
    shape = shape_of(HFDirectory(directory).config)
    pipeline = check_engine.make_config(str(directory), {"pipeline": 2}, {"name": "adam"})
    assert {c.name for c in contenders(pipeline, shape, 1, [2])} == {
        name for name in [BASELINE, *NAMES] if "shared" not in name
    }
    parts = check_engine.make_config(str(directory), {}, {"name": "adam"}, micro_batch_size=2)
    names = {c.name for c in contenders(parts, shape, 1, [2])}
    assert "shared" in names and "single, shared" not in names
    found = [(c.name, c.objectives) for c in contenders(parts, shape, 1, [2, 4], ["one_pass", "last_"])]
    assert found == [
        (BASELINE, 1),
        *((name, m) for m in (2, 4) for name in NAMES if name in ("one_pass", "last_layer", "last_block")),
    ]


def test_a_name_that_no_strategy_has() -> None:
    check_names(["one_pass", "row"])
    with pytest.raises(ValueError, match=r"^--only: found 'onepass', accepted: a part of .*'one_pass'"):
        check_names(["one_pass", "onepass"])


def test_a_scalarizer_is_left_aside(tmp_path: Path) -> None:
    """The batch has advantages for every objective, and so have the strategies rows."""
    tiny_llama(tmp_path / "model")
    plain = check_engine.make_config(str(tmp_path / "model"), {}, {"name": "adam"})
    shape = shape_of(HFDirectory(tmp_path / "model").config)
    sections = {"scalarization": {"name": "gdpo"}, "gradients": {"audit_every": 2}}
    scalarized = type(plain).model_validate(plain.model_dump(exclude={"gradients"}) | sections)
    found = contenders(scalarized, shape, 1, [2])
    assert [c.name for c in found] == [c.name for c in contenders(plain, shape, 1, [2])]
    assert {len(c.config.rows) for c in found if c.name != BASELINE} == {2}
