"""Tuning, kept results, tables and the command of the test bed."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.testbed import report
from benchmarks.testbed.__main__ import app
from benchmarks.testbed.cells import Plan, search
from benchmarks.testbed.methods import CORE, HIGHEST_RATE, METHODS, Setting
from benchmarks.testbed.preferences import METHODS_OF_FRONTS, preferences
from benchmarks.testbed.regimes import REGIMES
from benchmarks.testbed.store import COMPUTE, FRONT, Store, path_of
from gapo_mega import aggregation, scalarization

PLAN = Plan(seeds=2, steps=3)


def test_every_method_of_the_package_takes_part():
    built = {(method.kind, method.name) for method in METHODS.values()}
    assert built == {("aggregation", name) for name in aggregation.methods()} | {
        ("scalarization", name) for name in scalarization.scalarizers()
    }
    assert set(CORE) <= set(METHODS)
    assert all(METHODS[name].preferred is not None for name in METHODS_OF_FRONTS)


@pytest.mark.parametrize(
    ("best", "expected"), [(0.02, 0.02), (0.003, 0.0025), (0.11, 0.08), (9.0, HIGHEST_RATE)]
)
def test_tuning_goes_on_while_the_best_rate_lies_at_an_end(best, expected):
    def score(settings):
        return [-abs(np.log(setting.rate / best)) - abs(setting.kl - 1.4) for setting in settings]

    chosen, tried = search(METHODS["gdpo"], score)
    assert (chosen.rate, chosen.kl) == (pytest.approx(expected), 1.4)
    rates = sorted({one["rate"] for one in tried})
    assert len(tried) == len(rates) * len(METHODS["gdpo"].kl_factors)
    assert expected == HIGHEST_RATE or rates[0] < expected < rates[-1]


def test_finished_results_are_kept_unless_the_plan_changes(tmp_path):
    store = Store(tmp_path, PLAN)
    made = store.get("kinds2", "tchebycheff")
    assert set(made["tuned"]["options"]) == {"mu"}
    path = path_of(tmp_path, "kinds2", "tchebycheff", "")
    changed = json.loads(path.read_text(encoding="utf-8")) | {"worst": [7.0, 8.0]}
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert store.get("kinds2", "tchebycheff")["worst"] == [7.0, 8.0]
    other = Store(tmp_path, Plan(seeds=3, steps=3)).get("kinds2", "tchebycheff")
    assert len(other["worst"]) == 3
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_results_follow_what_tuning_chose(tmp_path):
    store = Store(tmp_path, PLAN)
    cell, compute = store.get("benign", "mgda"), store.get("benign", "mgda", COMPUTE)
    assert compute["tuned"] == cell["tuned"]
    assert (cell["steps"], compute["steps"]) == (3, round(3 / 1.13))
    front = store.get("benign", "p_gapo", FRONT)
    around = Setting(**store.get("benign", "p_gapo")["tuned"])
    assert front["tuned"]["rate"] / around.rate in (0.5, 1.0, 2.0)
    assert len(front["hypervolume"]) == 2
    assert 0 <= min(front["hypervolume"]) <= max(front["hypervolume"]) <= 1


def test_tables_show_means_errors_and_paired_differences(tmp_path):
    store = Store(tmp_path, Plan(seeds=3, steps=2))

    def write(name, worst, plan=store.plan):
        head = {"regime": "benign", "method": name, "what": plan.told(METHODS[name])}
        numbers = {key: [0.1, 0.2, 0.3] for key in ("mean", "distance", "hurt", "hurt_any", "kl")}
        tuned = {"rate": 0.02, "kl": 1.4, "options": {}}
        cell = head | {"worst": worst, "possible": [0.5, 0.5, 0.8], "tuned": tuned} | numbers
        path_of(tmp_path, "benign", name, "").write_text(json.dumps(cell), encoding="utf-8")

    write("weighted_sum", [0.1, 0.2, 0.3])
    write("gdpo", [0.15, 0.25, 0.36])
    write("gapo", [0.1, 0.0, 0.5])
    write("mgda", [9.0, 9.0, 9.0, 9.0], Plan(seeds=4, steps=2))  # of another plan: does not count
    result = report.collected(store)
    assert result["plan"]["seeds"] == 3 and len(result["cells"]) == 3
    text = "\n".join(report.tables(result))
    assert "| possible | .600 ±.100 |" in text
    assert "| GDPO | .253 ±.061 |" in text
    beyond = text.split("beyond the weighted sum's")[1]
    # GDPO: .05, .05, .06, at sixteen standard errors. GAPO: 0, -.2, .2.
    assert "| GDPO | **.053 ±.003** |" in beyond and "| GAPO, p = 1 | .000 ±.115 |" in beyond
    assert "| weighted sum |" not in beyond.split("##")[0]
    assert "| GDPO | 0.02, KL 1.4 |" in text and "| weighted sum | 0.02 |" in text
    written = json.loads(report.write_results(result, tmp_path / "out" / "results.json").read_text("utf-8"))
    assert written == result
    assert report.tables(written) == report.tables(result)


def test_shares_of_the_possible_are_of_methods_with_all_regimes():
    regimes = {"a": "first", "b": "second"}
    cells = [
        {"regime": regime, "method": method, "possible": [0.4, 0.6], "worst": worst}
        for method, regime, worst in (
            ("gdpo", "a", [0.1, 0.3]),  # .4 ±.2
            ("gdpo", "b", [-0.1, -0.1]),  # -.2
            ("gapo", "a", [0.2, 0.2]),  # .4
            ("gapo", "b", [0.1, 0.1]),  # .2
            ("mgda", "a", [0.5, 0.5]),  # not in the other regime
        )
    ]
    result = {"regimes": regimes, "cells": cells, "equal_compute": [], "fronts": []}
    numbers = {"mean": [0.0, 0.0], "distance": [0.0, 0.0], "hurt": [0.0, 0.0], "hurt_any": [0.0, 0.0]}
    tuned = {"rate": 0.02, "kl": 1.0, "options": {}}
    for cell in cells:
        cell |= {"kl": [0.0, 0.0], "tuned": tuned} | numbers
    rows = report.tables(result)[0].splitlines()[4:]
    assert rows == [
        "| GAPO, p = 1 | .300 ±.000 | .200 ±.000 | second |",
        "| GDPO | .100 ±.100 | -.200 ±.000 | second |",
    ]


def test_numbers_are_short_and_keep_their_sign():
    assert [str(report.Estimate(x, 0.0)) for x in (-0.0004, -0.014, 1.2, -1.5)] == [
        ".000 ±.000",
        "-.014 ±.000",
        "1.200 ±.000",
        "-1.500 ±.000",
    ]


def test_preferences_are_positive_and_symmetric():
    for count in (2, 3):
        found = np.array(preferences(count))
        assert found.shape == (10, count)
        np.testing.assert_allclose(found.sum(1), 1)
        assert found.min() > 0
        np.testing.assert_allclose(found.mean(0), 1 / count)


@pytest.mark.parametrize(("option", "known"), [("regime", REGIMES), ("method", METHODS)])
def test_an_unknown_name_is_told_with_the_known_ones(tmp_path, option, known):
    found = CliRunner().invoke(app, ["--out", str(tmp_path), f"--{option}", "nonsense"])
    assert found.exit_code == 2
    text = re.sub(r"\s+", " ", found.output)
    assert text.startswith(f"error: {option}: found 'nonsense', accepted: ")
    assert all(name in text for name in known)
    assert list(tmp_path.iterdir()) == []


def test_what_lies_in_the_way_is_told(tmp_path):
    arguments = ["--regime", "kinds2", "--method", "mgda", "--seeds", "2", "--steps", "2", "--no-picture"]
    path_of(tmp_path / "cells", "kinds2", "mgda", "").parent.mkdir()
    for text in ("{", "[]", "{}", '{"what": 3}'):
        path = path_of(tmp_path / "cells", "kinds2", "mgda", "")
        path.write_text(text, encoding="utf-8")
        found = CliRunner().invoke(app, ["--out", str(tmp_path), *arguments])
        assert found.exit_code == 2
        last = found.output.strip().splitlines()[-1]
        assert last == f"error: out: found {path}, accepted: a result of the test bed; remove it"
    found = CliRunner().invoke(app, ["--out", str(path), *arguments])
    assert found.exit_code == 2 and "which is no folder" in found.output


def test_the_command_writes_results_tables_and_a_picture(tmp_path):
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--steps", "2", "--regime", "kinds2"]
    found = CliRunner().invoke(app, [*arguments, "--method", "mgda", "--method", "gdpo"])
    assert found.exit_code == 0, found.output
    written = {line.split("written: ")[1] for line in found.output.splitlines() if "written: " in line}
    assert written == {str(tmp_path / name) for name in ("results.json", "tables.md", "trajectories.png")}
    assert (tmp_path / "trajectories.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert {cell["method"] for cell in result["cells"]} >= {"gdpo", "mgda"}
    assert {len(way) for way in result["trajectories"]["ways"].values()} == {2}  # the start and the end
    assert "GDPO" in (tmp_path / "tables.md").read_text("utf-8")


def test_results_of_another_folder_count_as_done(tmp_path):
    arguments = ["--seeds", "2", "--steps", "2", "--regime", "kinds2", "--method", "mgda", "--no-picture"]
    assert CliRunner().invoke(app, ["--out", str(tmp_path / "one"), *arguments]).exit_code == 0
    file = tmp_path / "one" / "results.json"
    result = json.loads(file.read_text("utf-8"))
    result["cells"][0]["worst"] = [7.0, 8.0]
    file.write_text(json.dumps(result), encoding="utf-8")
    known = ["--known", str(file)]
    found = CliRunner().invoke(app, ["--out", str(tmp_path / "two"), *known, *arguments])
    assert found.exit_code == 0 and f"{file}: 2 results" in found.output  # the cell, and at equal compute
    assert json.loads((tmp_path / "two" / "results.json").read_text("utf-8")) == result
    # Of another plan it is measured again.
    other = [*arguments[:2], "--steps", "3", *arguments[4:]]
    assert CliRunner().invoke(app, ["--out", str(tmp_path / "three"), *known, *other]).exit_code == 0
    again = json.loads((tmp_path / "three" / "results.json").read_text("utf-8"))
    assert [cell["steps"] for cell in again["cells"]] == [3]
    file.write_text('{"cells": 3}', encoding="utf-8")
    found = CliRunner().invoke(app, ["--out", str(tmp_path / "four"), *known, *arguments])
    assert found.exit_code == 2
    assert found.output.startswith(f"error: known: found {file}, accepted: results.json of the test bed")
