"""The grid of a sweep as points: what each one sets, its name, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gapo_mega.config.loading import load
from gapo_mega.config.sweep import SweepConfig
from gapo_mega.runs.sweep_points import Point, points_of

BASE: dict[str, Any] = {
    "output_dir": "unused",
    "seed": 7,
    "model": {"path": "somewhere/model"},
    "data": {"source": "package:prompts"},
    "objectives": [
        {"name": "concise", "function": "gapo_mega.demo.rewards:concise"},
        {"name": "plain", "function": "gapo_mega.demo.rewards:plain"},
    ],
    "aggregation": {"name": "gapo", "options": {"p": 1}},
}


def expand(folder: Path, **keys: Any) -> tuple[list[Point], list[str]]:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    file = folder / "sweep.yaml"
    file.write_text(json.dumps({"base": "base.yaml", "output_dir": str(folder / "out"), **keys}))
    return points_of(load(file, kind=SweepConfig), file)


def test_every_value_with_every_other(tmp_path: Path) -> None:
    grid = {
        "preference": [[0.2, 0.8], [0.5, 0.5]],
        "method": ["p_gapo", "morlhf"],
        "optimizer.lr": [1e-5, 1e-6],
    }
    points, notes = expand(tmp_path, seeds=[1, 2], grid=grid)
    assert notes == []
    assert len(points) == 2 * 2 * 2 * 2 and [point.index for point in points] == list(range(16))
    assert len({point.directory for point in points}) == 16
    first, second = points[:2]
    assert first.name == "p_gapo-0.2_0.8-optimizer.lr=1e-05-seed1"
    assert first.group == second.group == "p_gapo-0.2_0.8-optimizer.lr=1e-05"
    assert (first.config.seed, second.config.seed) == (1, 2)
    assert first.config.optimizer.lr == 1e-5
    assert first.config.output_dir == str(first.directory) == str(tmp_path / "out" / "points" / first.name)


@pytest.mark.parametrize(
    ("method", "section", "option"),
    [
        ("p_gapo", "aggregation", "preference"),
        ("weighted_sum", "aggregation", "weights"),
        ("morlhf", "scalarization", "preference"),
        ("tchebycheff", "scalarization", "preference"),
        ("ctwa", "scalarization", "preference"),
        ("gdpo", "scalarization", "weights"),
        ("mo_grpo", "scalarization", "weights"),
        ("gd2po", "scalarization", "weights"),
    ],
)
def test_the_preference_goes_where_the_method_takes_it(
    tmp_path: Path, method: str, section: str, option: str
) -> None:
    (point,), _ = expand(tmp_path, grid={"method": [method], "preference": [[0.3, 0.7]]})
    assert point.preference == (0.3, 0.7) and point.seed == 7
    chosen = getattr(point.config, section)
    assert chosen.name == method and chosen.options[option] == [0.3, 0.7]


def test_gapo_takes_a_preference_with_rates(tmp_path: Path) -> None:
    method = {"name": "gapo", "options": {"rates": "adaptive"}}
    (point,), notes = expand(tmp_path, grid={"method": [method], "preference": [[0.3, 0.7]]})
    assert point.config.aggregation.options["preference"] == [0.3, 0.7] and not notes


def test_a_preference_of_the_base_s_own_method(tmp_path: Path) -> None:
    settings = {"aggregation": {"name": "p_gapo", "options": {"scale": "mean_norm"}}}
    (point,), _ = expand(tmp_path, settings=settings, grid={"preference": [[0.3, 0.7]]})
    assert point.config.aggregation.options == {"scale": "mean_norm", "preference": [0.3, 0.7]}


def test_a_users_own_class_takes_what_it_calls_equal_when_left_out(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from gapo_mega.aggregation.weighted_sum import WeightedSum\n"
        "@dataclass(kw_only=True)\n"
        "class Mine(WeightedSum):\n"
        "    equal_when_left_out = 'shares'\n"
        "    weights: None = None\n"
        "    shares: list | None = None\n"
        "    def per_objective(self):\n"
        "        return {} if self.shares is None else {'shares': self.shares}\n"
    )
    (point,), _ = expand(tmp_path, grid={"method": ["mine.py:Mine"], "preference": [[0.3, 0.7]]})
    assert point.config.aggregation.options["shares"] == [0.3, 0.7]
    assert point.method == "Mine"


def test_a_method_without_a_preference_has_one_point_and_is_told(tmp_path: Path) -> None:
    grid = {"method": ["gapo", "p_gapo"], "preference": [[0.2, 0.8], [0.5, 0.5], [0.8, 0.2]]}
    points, notes = expand(tmp_path, seeds=[1, 2], grid=grid)
    assert [point.name for point in points[:2]] == ["gapo-seed1", "gapo-seed2"] and len(points) == 2 + 6
    assert notes == ["gapo takes no preference: one point a seed in place of 3"]


def test_a_method_with_options_of_its_own(tmp_path: Path) -> None:
    methods = [{"name": "gapo", "options": {"p": 1}}, {"name": "gapo", "options": {"p": 2}}]
    points, _ = expand(tmp_path, grid={"method": methods})
    assert [point.method for point in points] == ["gapo(p=1)", "gapo(p=2)"]
    assert [point.config.aggregation.options["p"] for point in points] == [1, 2]
    assert all(
        set(point.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789()=._-") - set("()") for point in points
    )


def test_a_longer_grid_leaves_names_as_they_are(tmp_path: Path) -> None:
    some, _ = expand(tmp_path, seeds=[1], grid={"method": ["p_gapo"], "preference": [[0.5, 0.5]]})
    more, _ = expand(
        tmp_path, seeds=[3, 1], grid={"method": ["gdpo", "p_gapo"], "preference": [[0.1, 0.9], [0.5, 0.5]]}
    )
    assert {point.name for point in some} < {point.name for point in more}


def test_long_values_do_not_share_a_folder(tmp_path: Path) -> None:
    texts = ["Answer briefly, and " + "very " * 40 + end for end in ("kindly.", "plainly.")]
    points, _ = expand(tmp_path, grid={"data.system_prompt": texts})
    assert len({point.directory for point in points}) == 2
    assert all(len(point.name) < 130 for point in points)
    assert [point.config.data.system_prompt for point in points] == texts


def test_values_arrive_as_they_are(tmp_path: Path) -> None:
    values = ["true", "1e-3", "[x", "a: b # c", '"quoted"', "ünïcode 🙂", None]
    points, _ = expand(tmp_path, grid={"data.system_prompt": values})
    assert [point.config.data.system_prompt for point in points] == values


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": {"method": ["gapo"], "preference": [[0.5, 0.5]]}}, "gapo takes no preference"),
        ({"grid": {"method": ["p_gap"]}}, "did you mean 'p_gapo'"),
        ({"grid": {"optimizer.lrr": [1.0]}}, "the nearest is 'lr'"),
        ({"grid": {"seed": [1, 2]}}, "found the key seed, accepted: seeds"),
        ({"grid": {"method": []}}, "no value for method"),
        ({"grid": {"checkpoint.keep": [1, 2]}}, "found the key checkpoint.keep, which changes no number"),
        ({"grid": {"preference": [0.5]}}, "found the preference 0.5"),
        ({"grid": {"optimizer.lr": [1e-5, 1e-5]}}, "found a value of optimizer.lr twice"),
        ({"seeds": [1, 1]}, "accepted: each once"),
        ({"grid": {"steps": [1]}, "settings": {"steps": 2}}, "found the key steps, which grid has too"),
        ({"settings": {"output_dir": "x"}}, "found the key output_dir"),
        ({"base": "nowhere.yaml"}, "base: file"),
        (
            {"grid": {"method": ["p_gapo"], "preference": [[1]], "aggregation.options.preference": [[1]]}},
            "found beside aggregation.options.preference",
        ),
    ],
)
def test_one_line_for_what_no_run_can_have(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        expand(tmp_path, **keys)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_point_puts_its_model_somewhere_of_its_own(tmp_path: Path) -> None:
    settings = {"checkpoint": {"export_to": "s3://bucket/sweep/"}}
    points, _ = expand(tmp_path, settings=settings, seeds=[1, 2], grid={"optimizer.lr": [1e-5]})
    assert [point.config.checkpoint.export_to for point in points] == [
        f"s3://bucket/sweep/{point.name}" for point in points
    ]
