"""What an output directory holds: whose, finished or not, and what ``--overwrite`` removes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import CheckpointConfig, LoggingConfig
from gapo_mega.runs.directory import MANIFEST_FILE, Wanted, begin, check_directory, end, read_manifest
from gapo_mega.runs.recorded_config import record_config
from tests.helpers.fake_runs import configuration

LINE = json.dumps({"step": 1, "gradient_norm": 1.0, "tokens_per_second": 5.0}) + "\n"
SUMMARY = json.dumps({"objectives": {}, "seconds": 1.0})


def wanted(command: str = "gapo-mega train", report: bool = True, **checkpoint: Any) -> Wanted:
    return Wanted(command, CheckpointConfig(**checkpoint), LoggingConfig(), report)


def checkpoint(directory: Path, step: int) -> None:
    path = directory / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "complete.json").write_text(json.dumps({"step": step}))
    (path / "weights").write_text("w")


def run(directory: Path, *, checkpoints: tuple[int, ...] = (), finished: int | None = None) -> None:
    """A directory as a run leaves it, after a line of the log and these checkpoints."""
    directory.mkdir(exist_ok=True)
    begin(directory, wanted(), overwrite=False)
    record_config(configuration(directory), directory)
    (directory / "metrics.jsonl").write_text(LINE)
    (directory / "tensorboard").mkdir()
    (directory / "tensorboard" / "events.out.tfevents.1.host").write_text("")
    for step in checkpoints:
        checkpoint(directory, step)
    if finished is not None:
        for folder, file in (
            ("hf", "model.safetensors"),
            ("report", "index.html"),
            ("report", "overview.png"),
        ):
            (directory / folder).mkdir(exist_ok=True)
            (directory / folder / file).write_text(folder)
        (directory / "summary.json").write_text(SUMMARY)
        end(directory, finished)


def refusal(directory: Path, want: Wanted | None = None, overwrite: bool = False) -> str:
    with pytest.raises(ValueError) as caught:
        check_directory(directory, want or wanted(), overwrite)
    line = str(caught.value)
    assert "\n" not in line and "accepted" in line
    return line


def test_a_new_or_empty_directory_is_accepted(tmp_path: Path) -> None:
    check_directory(tmp_path, wanted(), overwrite=False)
    check_directory(tmp_path / "a" / "b", wanted(), overwrite=True)
    (tmp_path / "notes.txt").write_text("mine")
    check_directory(tmp_path, wanted(), overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_a_place_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path / 'file'} is a file" in refusal(tmp_path / "file")
    assert f"but {tmp_path / 'file'} is a file" in refusal(tmp_path / "file" / "a" / "b")
    assert "is a link to nothing" in refusal(tmp_path / "link")


@pytest.mark.skipif("__import__('os').geteuid() == 0", reason="root may write anywhere")
def test_a_directory_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "is not writable" in refusal(tmp_path / "locked")
    assert "is not writable" in refusal(tmp_path / "locked" / "run")


FINISHED = "where a run has ended"


@pytest.mark.parametrize(
    ("checkpoints", "finished", "accepted"),
    [
        ((), None, True),  # killed on its way, nothing to resume: begins again
        ((2,), None, True),
        ((), 4, False),
        ((4,), 4, True),  # more steps go on; the same steps only end again
        ((2,), 4, False),  # the last steps would be done again
        ((2, 4), 4, True),
    ],
)
def test_a_finished_run_is_not_done_again(
    tmp_path: Path, checkpoints: tuple[int, ...], finished: int | None, accepted: bool
) -> None:
    run(tmp_path, checkpoints=checkpoints, finished=finished)
    if accepted:
        check_directory(tmp_path, wanted(), overwrite=False)
    else:
        line = refusal(tmp_path)
        assert line.startswith(f"output_dir: found {tmp_path}, {FINISHED}")
        assert "--overwrite" in line and "another output_dir" in line and "more steps" in line
    check_directory(tmp_path, wanted(), overwrite=True)


@pytest.mark.parametrize("gone", ["summary.json", "hf"])
def test_either_result_of_a_finished_run_is_kept(tmp_path: Path, gone: str) -> None:
    run(tmp_path, finished=4)
    path = tmp_path / gone
    if path.is_dir():
        (path / "model.safetensors").unlink()
        path.rmdir()
    else:
        path.unlink()
    assert FINISHED in refusal(tmp_path)


def test_a_run_killed_in_its_end_is_not_done_again(tmp_path: Path) -> None:
    """The model is there, the summary is not, and nothing is there to resume from."""
    run(tmp_path)
    (tmp_path / "hf").mkdir()
    assert FINISHED in refusal(tmp_path)


def test_a_run_of_an_earlier_version_is_known_by_its_files(tmp_path: Path) -> None:
    run(tmp_path, finished=4)
    (tmp_path / MANIFEST_FILE).unlink()
    assert FINISHED in refusal(tmp_path)
    checkpoint(tmp_path, 4)
    check_directory(tmp_path, wanted(), overwrite=False)
    begin(tmp_path, wanted(), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST_FILE]


def test_resume_false_with_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, checkpoints=(3,))
    assert refusal(tmp_path, wanted(resume=False)).startswith("checkpoint.resume: found false, but ")
    check_directory(tmp_path, wanted(resume=False), overwrite=True)


def test_another_commands_run(tmp_path: Path) -> None:
    run(tmp_path, checkpoints=(3,))
    line = refusal(tmp_path, wanted("gapo-mega sft", report=False))
    assert f"found {tmp_path}, which gapo-mega train has written; accepted for gapo-mega sft" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n'),
        ("metrics.jsonl", "some text\n"),
        ("summary.json", '{"accuracy": 1}'),
        ("summary.json", "[]"),
        ("hf", None),
        ("report", None),
        ("checkpoints", None),
        ("checkpoints", "a file"),
        ("tensorboard", None),
    ],
)
@pytest.mark.parametrize("after", ["nothing", "a run"])
def test_somebody_elses_file_under_a_name_of_ours(
    tmp_path: Path, name: str, content: str | None, after: str
) -> None:
    if after == "a run":
        if content is None:
            pytest.skip("a folder of a run's name is the run's")
        run(tmp_path)
    path = tmp_path / name
    if path.is_dir():
        path.rename(tmp_path / "moved")
    if content is None:
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    else:
        path.write_text(content)
    for overwrite in (False, True):
        assert f"output_dir: found {path}, which no run has written" in refusal(tmp_path, overwrite=overwrite)
    assert path.exists()


def test_a_file_that_was_put_into_the_exported_model(tmp_path: Path) -> None:
    """The next export replaces the whole directory."""
    run(tmp_path, checkpoints=(4,), finished=4)
    (tmp_path / "hf" / "README.md").write_text("my model card")
    for overwrite in (False, True):
        assert f"found {tmp_path / 'hf' / 'README.md'}, which no run" in refusal(
            tmp_path, overwrite=overwrite
        )


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path, checkpoints=(2, 4), finished=4)
    for cut in (1, 2):
        (tmp_path / f"metrics.cut-{cut}.jsonl").write_text(LINE)
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.csv").write_text("")
    (tmp_path / "checkpoints" / ".incomplete-step_00000005").mkdir()
    mine = ["notes.txt", "report/notes.md", "report/mine.png", "checkpoints/best/weights", "audit/mine.csv"]
    mine += ["tensorboard/readme", "wandb/run-1/log", "config.yml", "data/prompts.jsonl"]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    begin(tmp_path, wanted(), overwrite=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*mine, MANIFEST_FILE}
    found = read_manifest(tmp_path)
    assert found is not None and found.finished is None and not found.files


def test_overwrite_leaves_an_edited_configuration(tmp_path: Path) -> None:
    run(tmp_path, finished=4)
    own = tmp_path / "config.yaml"
    own.write_text(own.read_text() + "# tuned by hand\n")
    content = own.read_bytes()
    begin(tmp_path, wanted(), overwrite=True)
    assert own.read_bytes() == content


def test_without_overwrite_nothing_goes(tmp_path: Path) -> None:
    run(tmp_path, checkpoints=(4,), finished=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    check_directory(tmp_path, wanted(), overwrite=False)
    begin(tmp_path, wanted(), overwrite=False)
    before.pop(tmp_path / MANIFEST_FILE)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"names": []}'])
def test_a_manifest_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    assert "which is not as a run writes it" in refusal(tmp_path)


def test_overwriting_removes_a_link_and_not_the_checkpoint_behind_it(tmp_path: Path) -> None:
    run(tmp_path / "a", checkpoints=(2,))
    run(tmp_path / "b")
    (tmp_path / "b" / "checkpoints").mkdir()
    original = tmp_path / "a" / "checkpoints" / "step_00000002"
    (tmp_path / "b" / "checkpoints" / "step_00000002").symlink_to(original)
    begin(tmp_path / "b", wanted(), overwrite=True)
    assert not (tmp_path / "b" / "checkpoints").exists()
    assert sorted(path.name for path in original.iterdir()) == ["complete.json", "weights"]


@pytest.mark.parametrize("name", ["checkpoints", "hf", "metrics.jsonl"])
def test_a_link_to_what_another_run_has_is_refused(tmp_path: Path, name: str) -> None:
    run(tmp_path / "a", checkpoints=(2,), finished=2)
    run(tmp_path / "b")
    (tmp_path / "b" / name).unlink(missing_ok=True)
    (tmp_path / "b" / name).symlink_to(Path("..") / "a" / name)
    for overwrite in (False, True):
        assert "of another run" in refusal(tmp_path / "b", overwrite=overwrite)


def test_checkpoints_on_another_disk_are_no_other_runs(tmp_path: Path) -> None:
    run(tmp_path / "a", checkpoints=(2,))
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    check_directory(tmp_path / "a", wanted(), overwrite=False)


def test_kept_responses_are_the_runs_own(tmp_path: Path) -> None:
    keeps = Wanted("gapo-mega train", CheckpointConfig(), LoggingConfig(), report=True, responses=True)
    folder = tmp_path / "responses"
    folder.mkdir()
    check_directory(tmp_path, wanted(), overwrite=False)  # a run that keeps none takes no notice
    assert f"found {folder}, which no run has written" in refusal(tmp_path, keeps)
    folder.rmdir()
    begin(tmp_path, keeps, overwrite=False)
    folder.mkdir()
    for name in ("step_00000002.jsonl", "mine.jsonl"):
        (folder / name).write_text("{}\n")
    check_directory(tmp_path, keeps, overwrite=False)
    begin(tmp_path, wanted(), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["mine.jsonl"]
