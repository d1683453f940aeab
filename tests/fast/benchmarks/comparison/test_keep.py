"""What is kept of sweeps gives the tables of the sweeps themselves."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.comparison import gains
from benchmarks.comparison.keep import app
from tests.helpers.sweep_files import sweep


def test_tables_are_made_of_what_was_kept(tmp_path: Path) -> None:
    out = tmp_path / "kept"
    early = sweep(tmp_path / "a", {("gdpo", 1): {"rare": 0.25, "dense": 5.0}})
    assert CliRunner().invoke(app, [str(early), "--out", str(out)]).exit_code == 0
    before = gains.table(gains.read([early]))
    assert gains.table(gains.read([out / "a"])) == before
    # Another machine ends another point of the same sweep, and one of them again.
    late = sweep(
        tmp_path / "other" / "a",
        {("gdpo", 1): {"rare": 0.5, "dense": 1.0}, ("sum", 2): {"rare": -0.25, "dense": 9.0}},
    )
    done = CliRunner().invoke(app, [str(late), "--out", str(out)])
    assert done.exit_code == 0 and done.output == f"{out / 'a'}: 2 points\n"
    assert gains.table(gains.read([out / "a"])) == gains.table(gains.read([late]))
    assert gains.table(gains.read([late])) != before
    # Where the other has not ended, what was kept stays.
    assert CliRunner().invoke(app, [str(early), "--out", str(out)]).exit_code == 0
    assert {point["name"] for point in json.loads((out / "a" / "results.json").read_text())["points"]} == {
        "gdpo-seed1",
        "sum-seed2",
    }
    assert gains.read([out / "a"])[0].gains == gains.read([early])[0].gains


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [str(tmp_path), "--out", str(tmp_path / "kept")])
    assert done.exit_code == 1 and "found no results.json" in str(done.exception or done.output)
    assert not (tmp_path / "kept").exists()
