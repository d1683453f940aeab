"""``method: NAME``: one word for an aggregator or a scalarizer, with its options as they are by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gapo_mega.config.loading import dump
from gapo_mega.config.loading import load as load_plain
from gapo_mega.planning.methods import load, names

BASE: dict[str, Any] = {
    "output_dir": "o",
    "model": {"path": "m"},
    "data": {"source": "s"},
    "objectives": [{"name": "a", "function": "m:f"}, {"name": "b", "function": "m:f"}],
}
ONE_SET = {"aggregation": {"name": "p_gapo", "options": {"preference": [0.1, 0.9]}}}
MINE = """
from gapo_mega.scalarization.morlhf import Morlhf

class Mine(Morlhf):
    pass

class Neither:
    pass
"""


def written(folder: Path, **settings: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, **settings}))
    return path


@pytest.mark.parametrize(("name", "section"), sorted(names().items()))
def test_a_name_sets_its_section_and_resets_the_other(tmp_path: Path, name: str, section: str) -> None:
    config = load(written(tmp_path, **ONE_SET), [f"method={name}"])
    if section == "aggregation":
        assert (config.aggregation.name, config.aggregation.options) == (name, {"scale": "mean_norm"})
        assert config.scalarization is None and config.rows == ("a", "b")
    else:
        assert config.scalarization is not None
        assert (config.scalarization.name, config.scalarization.options) == (name, {})
        assert config.aggregation.options == {} and config.rows == (name,)
    # What a run records has no method, and means the same.
    dump(config, tmp_path / "resolved.yaml")
    assert "method" not in yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    assert load_plain(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=gapo", "aggregation.options.p=2"],
        ["aggregation.options.p=2", "method=gapo"],
        ["method=mgda", "method=gapo", "aggregation.options.p=2"],
        ["method={name: gapo, options: {p: 2}}"],
    ],
)
def test_other_overrides_come_after_it(tmp_path: Path, overrides: list[str]) -> None:
    config = load(written(tmp_path, **ONE_SET), overrides)
    assert config.aggregation.options == {"scale": "mean_norm", "p": 2}


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=ctwa", "scalarization.options.safe=true", "aggregation.average=0.9"],
        ["method={name: ctwa, options: {safe: true}}", "aggregation.average=0.9"],
    ],
)
def test_a_safe_scalarizer(tmp_path: Path, overrides: list[str]) -> None:
    config = load(written(tmp_path, **ONE_SET), overrides)
    assert config.scalarization is not None and config.scalarization.options == {"safe": True}
    assert config.rows == ("a", "b") and config.aggregation.average == 0.9
    dump(config, tmp_path / "resolved.yaml")
    assert load_plain(tmp_path / "resolved.yaml") == config


def test_in_a_file(tmp_path: Path) -> None:
    given = {"method": {"name": "gdpo", "options": {"variant": "verl"}}}
    config = load(written(tmp_path, **given))
    assert config.scalarization is not None and config.scalarization.options == {"variant": "verl"}
    assert load(written(tmp_path, **given), ["method=mgda"]).scalarization is None
    scaled = load(written(tmp_path, method={"name": "gapo", "options": {"scale": "none"}}))
    assert scaled.aggregation.options == {"scale": "none"}


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    config = load(written(tmp_path), ["method=mine.py:Mine"])
    assert config.scalarization is not None and config.scalarization.name == f"{tmp_path}/mine.py:Mine"
    assert config.rows == ("Mine",)
    with pytest.raises(ValueError, match="accepted: a class derived from Aggregator or Scalarizer"):
        load(written(tmp_path), ["method=mine.py:Neither"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=gdop"], r"^method: found 'gdop' \(did you mean 'gdpo'\?\), accepted: .*gapo, .*gdpo, .*"
         r"\(from override 'method=gdop'\)$"),
        (["method=3"], "^method: found 3, accepted: a name, or a mapping with name and options"),
        (["method={name: gapo, p: 2}"], "^method: found .*, accepted: a name, or a mapping"),
        (["method.options.p=2"], r"^method\.options\.p: found in the override .*aggregation\.options\.KEY"),
        (["method=gdpo", "aggregation.name=mgda"], "^aggregation: found mgda beside scalarization gdpo"),
        (["method=gapo", "gradients.audit_every=2"], "^gradients.audit_every: found 2 without scalarization"),
        (["method=gdpo", "objectives.0.name=gdpo"], "^objectives: found the name 'gdpo', which the log"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(written(tmp_path), overrides)


def test_it_stands_in_place_of_both_sections(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^method: found beside aggregation, accepted: one of them"):
        load(written(tmp_path, method="gapo", **ONE_SET))


def test_the_reader_below_the_plug_ins_says_who_reads_it(tmp_path: Path) -> None:
    said = r"^method: found 'gapo', accepted: none \(gapo_mega\.planning\.methods\.load reads"
    with pytest.raises(ValueError, match=said):
        load_plain(written(tmp_path, method="gapo"))
