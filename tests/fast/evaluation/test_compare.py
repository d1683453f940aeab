"""Runs side by side, against scipy's tests of the numbers that were written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gapo_mega.evaluation.compare import compare, groups_of
from gapo_mega.evaluation.compare_files import write_comparison
from gapo_mega.evaluation.finished_run import FinishedRun, read_run
from gapo_mega.evaluation.standing import Best, Standing
from gapo_mega.evaluation.summary import write_summary
from tests.helpers.finished_runs import UPDATES, write_run

P_GAPO = {"aggregation": {"name": "p_gapo", "options": {"preference": [0.2, 0.8]}}}
GDPO = {"scalarization": {"name": "gdpo"}}


def three_seeds(folder: Path) -> list[FinishedRun]:
    return [
        write_run(folder, f"{name}-{seed}", seed, shift, **sections)
        for name, shift, sections in (("p", 0.5, P_GAPO), ("gdpo", 0.3, GDPO))
        for seed in (1, 2, 3)
    ]


def test_means_errors_and_cost(tmp_path: Path) -> None:
    runs = three_seeds(tmp_path)
    found = compare(runs)
    assert [(g["label"], g["seeds"]) for g in found["groups"]] == [("p_gapo", [1, 2, 3]), ("gdpo", [1, 2, 3])]
    after = [run.summary["plain"].after for run in runs[:3]]
    shown = found["groups"][0]["after"]["plain"]
    assert shown["mean"] == pytest.approx(np.mean(after))
    assert shown["standard_error"] == pytest.approx(stats.sem(after))
    cost = {key: found["groups"][0][key]["mean"] for key in ("samples", "backwards", "updates", "seconds")}
    # One pass gives the gradients of both objectives; a step has 2 x 4 samples and one update.
    assert cost == {"samples": 8 * UPDATES, "backwards": UPDATES, "updates": UPDATES, "seconds": 12.0}
    assert found["groups"][0]["kl"]["mean"] == pytest.approx(np.mean([0.17, 0.18, 0.19]))


def test_backwards_of_other_ways_to_measure(tmp_path: Path) -> None:
    def backwards(name: str, **sections: Any) -> int:
        return write_run(tmp_path, name, 1, 0.0, **sections).cost.backwards

    assert backwards("separate", gradients={"forward": "separate"}) == 2 * UPDATES
    assert backwards("single", gradients={"store": "single"}) == (3 + 1) * UPDATES
    assert backwards("sum", **GDPO) == UPDATES
    # Every fifth update measures three gradients, of both objectives and of the scalarizer.
    audited = {"forward": "separate", "audit_every": 5}
    assert backwards("audited", **GDPO, gradients=audited) == UPDATES - 4 + 3 * 4
    assert backwards("critic", advantages={"name": "gae"}) == 2 * UPDATES


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        (["forward", "backward", "reduce"], 1),  # one pass
        (["one_pass"], 1),  # in a pipeline
        (["one_pass", "forward_backward/concise", "forward_backward/plain"], 1),  # tried first
        (["forward", "backward/concise", "backward/plain"], 2),  # shared
        (["forward_backward/concise", "forward_backward/plain"], 2),
    ],
)
def test_backwards_are_those_that_ran(tmp_path: Path, phases: list[str], expected: int) -> None:
    """A configuration does not say whether its layers were Transformer Engine's, which take no one pass."""
    assert write_run(tmp_path, "auto", 1, 0.0, phases).cost.backwards == expected * UPDATES


def test_one_gradient_is_no_sign_of_other_passes(tmp_path: Path) -> None:
    audited = {"gradients": {"audit_every": 5}}
    run = write_run(tmp_path, "sum", 1, 0.0, ["forward", "backward", "backward/concise"], **GDPO, **audited)
    assert run.cost.backwards == UPDATES


def test_tests_are_scipys(tmp_path: Path) -> None:
    runs = three_seeds(tmp_path)
    test = next(t for t in compare(runs)["tests"] if t["objective"] == "concise")
    ours, theirs = ([run.summary["concise"].after for run in part] for part in (runs[3:], runs[:3]))
    over_seeds = stats.ttest_rel(ours, theirs)
    assert test["over_seeds"]["n"] == 3
    assert test["over_seeds"]["p"] == pytest.approx(over_seeds.pvalue)
    assert test["over_seeds"]["interval"] == pytest.approx(list(over_seeds.confidence_interval(0.95)))

    def by_prompt(part: list[FinishedRun]) -> Any:
        """Means over two answers and three seeds [prompts]."""
        scores = []
        for run in part:
            lines = (run.directory / "heldout_answers.jsonl").read_text().split("\n")[:-1]
            scores.append([json.loads(line)["after"]["scores"]["concise"] for line in lines])
        return np.array(scores).reshape(3, 12, 2).mean(axis=(0, 2))

    over_prompts = stats.ttest_rel(by_prompt(runs[3:]), by_prompt(runs[:3]))
    assert test["over_prompts"]["n"] == 12
    assert test["over_prompts"]["p"] == pytest.approx(over_prompts.pvalue)
    assert test["over_prompts"]["difference"] == pytest.approx(test["over_seeds"]["difference"])


def test_settings_that_differ_make_groups(tmp_path: Path) -> None:
    def run(name: str, seed: int, lr: float, preference: list[float]) -> FinishedRun:
        options = {"name": "p_gapo", "options": {"preference": preference, "scale": "mean_norm"}}
        return write_run(tmp_path, name, seed, 0.0, aggregation=options, optimizer={"lr": lr})

    runs = [
        run("a", 1, 1e-5, [0.2, 0.8]),
        run("b", 2, 1e-5, [0.2, 0.8]),
        run("c", 1, 1e-5, [0.8, 0.2]),
        run("d", 1, 2e-5, [0.8, 0.2]),
    ]
    groups = groups_of(runs)
    assert {group.label: sorted(group.runs) for group in groups} == {
        "p_gapo(preference=0.2/0.8) optimizer.lr=1e-05": [1, 2],
        "p_gapo(preference=0.8/0.2) optimizer.lr=1e-05": [1],
        "p_gapo(preference=0.8/0.2) optimizer.lr=2e-05": [1],
    }
    alike = run("e", 1, 2e-5, [0.8, 0.2])
    with pytest.raises(ValueError, match="alike in all settings and the seed"):
        groups_of([*runs, alike])


def test_one_seed_has_no_error_and_no_test_over_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "p", 1, 0.5, **P_GAPO), write_run(tmp_path, "gdpo", 1, 0.3, **GDPO)]
    found = compare(runs, baseline="gdpo")
    assert found["groups"][0]["after"]["plain"]["standard_error"] is None
    assert found["baseline"] == "gdpo" and {test["group"] for test in found["tests"]} == {"p_gapo"}
    assert found["tests"][0]["over_seeds"] is None and found["tests"][0]["over_prompts"]["n"] == 12
    with pytest.raises(ValueError, match="--baseline: found 'gapo', accepted: one of p_gapo, gdpo"):
        compare(runs, baseline="gapo")


def test_files_hold_the_same_numbers(tmp_path: Path) -> None:
    found = compare(three_seeds(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    paths = write_comparison(out, found)
    assert [path.name for path in paths] == [
        "compare.md",
        "compare.csv",
        "compare.json",
        "front-concise-plain.png",
    ]
    assert json.loads((out / "compare.json").read_text()) == found
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    for row, group in zip(rows, found["groups"], strict=True):
        assert row["label"] == group["label"]
        assert float(row["after/plain"]) == group["after"]["plain"]["mean"]
        assert float(row["after/plain/standard_error"]) == group["after"]["plain"]["standard_error"]
    text = (out / "compare.md").read_text()
    mean = found["groups"][1]["after"]["concise"]["mean"]
    assert f"| gdpo | 3 | {mean:.4g} ±" in text
    assert (out / "front-concise-plain.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl", "config.yaml"])
def test_a_run_that_has_not_ended(tmp_path: Path, missing: str) -> None:
    directory = write_run(tmp_path, "run", 1, 0.0).directory
    (directory / missing).unlink()
    with pytest.raises(ValueError, match=f"run directory: found no {missing} in"):
        read_run(directory)


def test_a_run_without_held_out_prompts(tmp_path: Path) -> None:
    directory = write_run(tmp_path, "run", 1, 0.0).directory
    write_summary(directory / "summary.json", {}, 1.0)
    with pytest.raises(ValueError, match="found no held-out score of concise, plain"):
        read_run(directory)


def test_numbers_of_a_chosen_step_say_so(tmp_path: Path) -> None:
    """KL and length are those of that step, too; the cost is that of the whole run."""
    run = write_run(tmp_path, "best", 1, 0.5)
    standing = Standing(8, UPDATES, UPDATES, ended=True, best=Best("plain", 8, 0.4, 5))
    write_summary(run.directory / "summary.json", run.summary, 12.0, standing=standing)
    found = read_run(run.directory)
    assert found.standing == standing
    # A tenth of the run is two steps, made odd; the log counts 0.01 a step from 0.
    assert found.kl == pytest.approx(np.mean([0.05, 0.06, 0.07]))
    assert found.cost == run.cost
    told = found.as_dict()
    assert (told["step"], told["steps"], told["best"]["by"]) == (8, UPDATES, "plain")
    shown = compare([found, write_run(tmp_path, "last", 2, 0.5)])
    assert shown["groups"][0]["of_steps"] == [8, UPDATES]
    paths = write_comparison(tmp_path, shown)
    assert f"| 8 to {UPDATES} |" in paths[0].read_text()


def test_reward_calls_count_the_greedy_responses_of_a_baseline(tmp_path: Path) -> None:
    group = write_run(tmp_path, "group", 1, 0.0)
    assert group.as_dict()["reward_calls"] == 2 * 8 * UPDATES  # objectives, responses of a step
    remax = write_run(tmp_path, "remax", 1, 0.0, advantages={"name": "remax"})
    assert remax.as_dict()["reward_calls"] == 2 * (8 + 2) * UPDATES  # and one for each prompt
