"""Which model a path means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.evaluation.standing import Best, Standing
from gapo_mega.evaluation.summary import write_summary
from gapo_mega.runs.directory import MANIFEST_FILE
from gapo_mega.runs.evaluated_models import find_model, find_models, find_reference


def run(folder: Path, *steps: int, export: bool = False, finished: int | None = None) -> Path:
    folder.mkdir()
    about: dict[str, Any] = {"command": "gapo-mega train", "names": [], "files": {}, "finished": finished}
    (folder / MANIFEST_FILE).write_text(json.dumps(about))
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "complete.json").write_text(json.dumps({"step": step}))
    if export:
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("steps", "export", "finished", "expected"),
    [
        ((2, 4), False, None, "checkpoints/step_00000004"),
        ((2, 4), True, 4, "hf"),
        ((4, 6), True, 4, "checkpoints/step_00000006"),  # it has gone on
        ((4, 6), True, None, "checkpoints/step_00000006"),
        ((), True, 4, "hf"),
    ],
)
def test_of_a_run_it_is_the_newest(
    tmp_path: Path, steps: tuple[int, ...], export: bool, finished: int | None, expected: str
) -> None:
    folder = run(tmp_path / "gapo", *steps, export=export, finished=finished)
    found = find_model(str(folder))
    assert (found.name, found.source) == ("gapo", folder / expected)


@pytest.mark.parametrize(("best", "expected"), [(2, 2), (4, 4), (None, 6)])
def test_without_an_export_the_result_is_its_checkpoint(
    tmp_path: Path, best: int | None, expected: int
) -> None:
    folder = run(tmp_path / "gapo", 2, 4, 6, finished=6)
    if best is not None:  # None: of a version whose summary does not say it
        standing = Standing(best, 6, 8, ended=True, best=Best("worst_gain", best, 0.5, 3))
        write_summary(folder / "summary.json", {}, 1.0, standing=standing)
    assert find_model(str(folder)).source == folder / "checkpoints" / f"step_{expected:08d}"


def test_a_result_that_was_not_kept_is_not_another_step(tmp_path: Path) -> None:
    folder = run(tmp_path / "gapo", 3, finished=10)
    with pytest.raises(
        ValueError, match=r"^--model: found .*, whose result is the policy of step 10, .*ps 3"
    ):
        find_model(str(folder))


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--model: found .*begun, a run without a checkpoint or an exp"):
        find_model(str(run(tmp_path / "begun")))


def test_names(tmp_path: Path) -> None:
    folder = run(tmp_path / "a b", 3, export=True)
    (tmp_path / "x=y").mkdir()
    given = [
        str(folder / "hf"),
        str(folder / "checkpoints" / "step_00000003"),
        f"base={tmp_path}",
        str(tmp_path / "x=y"),
    ]
    found = find_models(given)
    assert [model.name for model in found] == ["a-b", "a b-step_00000003".replace(" ", "-"), "base", "x-y"]
    assert find_reference("base", found) is found[2]
    assert find_reference(given[0], found) is found[0]
    assert find_reference(str(folder), found).source == folder / "checkpoints" / "step_00000003"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"^--model: found none, accepted: one or more"),
        (["{0}", "{0}"], r"^--model: found two models called '.*', accepted: NAME=PATH with names that"),
        (["a/b={0}"], r"^--model: found the name 'a/b' in "),
        (["..={0}"], r"^--model: found the name '\.\.' in "),
        (["{0}/none"], r"^--model: found '.*none', which is neither a local directory"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_models([text.format(tmp_path) for text in given])
