"""A run that goes on leaves nothing of its earlier end where the longer run's result would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.evaluation.finished_run import read_run
from gapo_mega.runs.directory import MANIFEST_FILE, begin, check_directory, end
from gapo_mega.runs.earlier_ends import set_aside_ends, set_aside_others
from gapo_mega.runs.evaluated_models import find_model
from gapo_mega.runs.start import wanted
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_runs import configuration, trainer

NAMES = ["adapter", "heldout_answers.jsonl", "hf", "report", "summary.json"]


class Exporting(FakeEngine):
    """Exports what says of which policy it is, in place of an older one as the engine does."""

    def export_hf(self, directory: Path) -> None:
        self._called("export_hf")
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps({"policy": self.policy}))


def train(directory: Path, steps: int, engine: FakeEngine | None = None, **checkpoint: Any) -> None:
    """A run to its end, with its manifest."""
    checkpoint = {"save_final": True, "export_hf": True, **checkpoint}
    config = configuration(directory, steps=steps, checkpoint=checkpoint)
    check_directory(directory, wanted(config), overwrite=False)
    begin(directory, wanted(config), overwrite=False)
    run = trainer(directory, engine or Exporting(), with_report=True, steps=steps, checkpoint=checkpoint)
    assert run.run()
    end(directory, run.loop.step, steps)


def names(directory: Path) -> list[str]:
    """Results and what was set aside of them."""
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(tuple("ahrs")))


def results(directory: Path, step: int) -> None:
    """What an end at ``step`` leaves."""
    for name in NAMES:
        if "." in name:
            (directory / name).write_text(json.dumps({"step": step, "steps": step}))
        else:
            (directory / name).mkdir(parents=True)
            (directory / name / "of").write_text(str(step))


def test_more_steps_without_an_export(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model of step 2 is not that of the run which has ended at step 4."""
    run = tmp_path / "run"
    run.mkdir()
    train(run, 2)
    assert find_model(str(run)).source == run / "hf"
    first = (run / "hf" / "config.json").read_text()
    train(run, 4, export_hf=False)
    assert not (run / "hf").exists()
    assert find_model(str(run)).source == run / "checkpoints" / "step_00000004"
    assert (run / "hf.earlier-1" / "config.json").read_text() == first
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert json.loads((run / "summary.earlier-1.json").read_text())["steps"] == 2
    assert (run / "report" / "index.html").is_file() and (run / "report.earlier-1" / "index.html").is_file()
    told = "set aside: hf is now hf.earlier-1, heldout_answers.jsonl is now heldout_answers.earlier-1.jsonl, "
    assert told in caplog.text
    assert "summary.earlier-1.json (of the end at step 2, and the run goes on from step 2)" in caplog.text


def test_killed_on_the_way_to_more_steps(tmp_path: Path) -> None:
    """Whoever looks then finds no model and no numbers of the earlier end."""

    class KilledError(BaseException):
        pass

    def kill() -> None:
        raise KilledError

    run = tmp_path / "run"
    run.mkdir()
    train(run, 2)
    engine = Exporting(at={("export_hf", 1): kill})
    with pytest.raises(KilledError):
        train(run, 4, engine)
    assert find_model(str(run)).source == run / "checkpoints" / "step_00000004"
    with pytest.raises(ValueError, match=r"^run directory: found no summary\.json"):
        read_run(run)
    train(run, 4)
    assert find_model(str(run)).source == run / "hf"
    assert not (run / "hf.earlier-2").exists()  # the end is what was missing


def test_each_longer_run_has_its_number(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for steps in (1, 2, 3):
        train(run, steps)
    assert [json.loads((run / f"summary.earlier-{n}.json").read_text())["steps"] for n in (1, 2)] == [1, 2]
    manifest = json.loads((run / MANIFEST_FILE).read_text())
    assert manifest["finished"] == 3 and manifest["files"]["hf"] == ["config.json"]


def test_the_same_end_again_changes_no_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    train(run, 2)
    before = names(run)
    train(run, 2)
    train(run, 2, export_hf=False)  # of the same step, and so still the run's
    train(run, 1)  # fewer: nothing is trained
    assert names(run) == before
    assert find_model(str(run)).source == run / "hf"


def test_links_go_alone_and_files_keep_their_suffix(tmp_path: Path) -> None:
    results(tmp_path, 3)
    (tmp_path / "hf").rename(tmp_path / "elsewhere")
    (tmp_path / "hf").symlink_to("elsewhere")
    (tmp_path / "adapter.earlier-1").mkdir()  # a number that one of them has is no one's
    set_aside_ends(tmp_path, 3)
    assert (tmp_path / "elsewhere" / "of").read_text() == "3"
    assert (tmp_path / "hf.earlier-2").is_symlink() and (tmp_path / "hf.earlier-2" / "of").is_file()
    assert not any((tmp_path / name).exists() for name in NAMES)
    assert (tmp_path / "heldout_answers.earlier-2.jsonl").is_file()


def test_a_report_of_a_run_under_way_stays(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    set_aside_ends(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("summary", ["{}", "[1]", "no JSON", '{"steps": null}', None])
def test_an_end_of_which_nothing_is_known(
    tmp_path: Path, summary: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    results(tmp_path, 3)
    (tmp_path / "summary.json").unlink()
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    set_aside_others(tmp_path, 3, ["summary.json", "report", "heldout_answers.jsonl"])
    assert not (tmp_path / "hf").exists() and not (tmp_path / "adapter").exists()
    assert (tmp_path / "report").exists()
    assert "of an end that was not completed, and the result of the run is of step 3" in caplog.text


def test_the_result_of_another_step_is_not_that_of_the_model(tmp_path: Path) -> None:
    """With ``checkpoint.best`` the result may be another step's, though nothing is trained."""
    results(tmp_path, 6)
    set_aside_others(tmp_path, 6, ["summary.json"])
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    set_aside_others(tmp_path, 4, ["summary.json"])
    assert (tmp_path / "hf.earlier-1" / "of").read_text() == "6" and (tmp_path / "summary.json").is_file()


def test_a_disk_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results(tmp_path, 3)

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ValueError, match=r"^output_dir: found .*cannot be written: Read-only file system"):
        set_aside_ends(tmp_path, 3)
