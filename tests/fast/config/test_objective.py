"""One entry of ``objectives``: columns, and outputs that become objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gapo_mega.config import Config
from gapo_mega.config.loading import dump, load

ENTRY = {"function": "json:loads", "outputs": ["right", "short"], "columns": ["answer"], "clip": 2.0}


def loaded(tmp_path: Path, objectives: list[dict[str, Any]], *overrides: str) -> Config:
    file = tmp_path / "run.yaml"
    sections = {"output_dir": "o", "model": {"path": "m"}, "data": {"source": "d"}, "objectives": objectives}
    file.write_text(yaml.safe_dump(sections))
    return load(file, overrides)


def test_every_output_is_an_objective(tmp_path: Path) -> None:
    config = loaded(tmp_path, [{"name": "first", "function": "json:dumps"}, ENTRY], "objectives.1.clip=3.0")
    assert config.rows == ("first", "right", "short")
    assert [o.output for o in config.objectives] == [None, "right", "short"]
    for each in config.objectives[1:]:
        assert (each.function, each.columns, each.clip, each.outputs) == ("json:loads", ["answer"], 3.0, None)
    # What a run records is read back as it is.
    dump(config, tmp_path / "again.yaml")
    assert load(tmp_path / "again.yaml") == config


def test_columns_of_all_objectives_with_the_first_that_asks(tmp_path: Path) -> None:
    others = [
        {"name": "a", "function": "json:loads", "columns": ["x", "answer"]},
        {"name": "b", "function": "json:loads", "columns": ["answer", "y"]},
    ]
    assert loaded(tmp_path, others).columns == {
        "x": "objective 'a': columns",
        "answer": "objective 'a': columns",
        "y": "objective 'b': columns",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a"}, r"in objectives.0: name: found 'a' beside outputs, accepted: none"),
        ({"output": "a"}, r"in objectives.0: output: found 'a' beside outputs, accepted: none"),
        ({"outputs": []}, r"objectives.0.outputs: found \[\], accepted: .*at least 1 item"),
        ({"outputs": "right"}, r"objectives.0.outputs: found 'right', accepted: a valid list"),
        ({"outputs": ["a b"]}, r"objectives.0.outputs.0: found 'a b', accepted: match pattern"),
        ({"outputs": ["a", "a"]}, r"outputs: found \['a', 'a'\], accepted: every name once"),
        ({"columns": ["a", "a"]}, r"columns: found \['a', 'a'\], accepted: every name once"),
        ({"columns": [""]}, r"objectives.0.columns.0: found '', accepted: "),
        ({"columns": "answer"}, r"objectives.0.columns: found 'answer', accepted: a valid list"),
        ({"outputs": [f"o{i}" for i in range(17)]}, r"objectives: found 17 with their outputs, accepted: 16"),
        ({"outputs": None}, r"objectives.0.name: not given"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        loaded(tmp_path, [ENTRY | changes])
    assert "\n" not in str(caught.value)


def test_an_output_may_not_have_the_name_of_another_objective(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"objectives: names must differ, found \['right', 'right', 'short'\]"
    ):
        loaded(tmp_path, [{"name": "right", "function": "json:loads"}, ENTRY])
