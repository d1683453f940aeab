"""Runs that put their model somewhere else: checked before, put last, and failing aloud."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tenacity import nap

from gapo_mega.config.loading import load
from gapo_mega.runs.directory import read_manifest
from gapo_mega.runs.uploading import put_from_main
from gapo_mega.runs.uploads import UPLOADED, Export
from gapo_mega.whereabouts import moves
from tests.helpers.fake_engine import FakeEngine, layout, terminate
from tests.helpers.fake_runs import configuration
from tests.helpers.held_runs import snapshot, start

URL, ROOT = "memory://bucket/run", "/bucket/run"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    monkeypatch.setattr(nap.time, "sleep", lambda seconds: None)
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()
    found.pseudo_dirs[:] = [""]


class Exporting(FakeEngine):
    def export_hf(self, directory: Path) -> None:
        self._called("export_hf")
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps({"policy": self.policy}))


def run(directory: Path, *, overwrite: bool = False, steps: int = 2, **checkpoint: Any) -> bool:
    settings = {"export_hf": True, "export_to": URL, "save_final": True, **checkpoint}
    finished, _ = start(
        directory, Exporting(), overwrite=overwrite, with_report=True, steps=steps, checkpoint=settings
    )
    return finished


def test_a_run_puts_its_model_there_and_a_longer_one_replaces_it(
    tmp_path: Path, store: MemoryFileSystem
) -> None:
    assert run(tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    assert manifest is not None
    note = json.loads(store.cat_file(f"{ROOT}/{UPLOADED}"))
    assert note == {"run": manifest.run, "step": 2, "files": ["config.json"]}
    assert run(tmp_path / "a", steps=3)
    assert json.loads(store.cat_file(f"{ROOT}/{UPLOADED}"))["step"] == 3
    assert store.cat_file(f"{ROOT}/config.json") == (tmp_path / "a" / "hf" / "config.json").read_bytes()
    assert run(tmp_path / "a", overwrite=True)  # another run, in place of the one that it overwrites
    assert json.loads(store.cat_file(f"{ROOT}/{UPLOADED}"))["step"] == 2


def test_a_run_that_overwrites_may_replace_the_model_after_a_restart_too(
    tmp_path: Path, store: MemoryFileSystem
) -> None:
    """The place has the model of the first run until the last one ends."""
    assert run(tmp_path / "a")
    for after in (1, 2):
        engine = Exporting(at={("update_policy", after): terminate})
        settings = {"export_hf": True, "export_to": URL, "save_final": True}
        finished, _ = start(tmp_path / "a", engine, overwrite=True, with_report=True, checkpoint=settings)
        assert not finished
    first = json.loads(store.cat_file(f"{ROOT}/{UPLOADED}"))["run"]
    assert run(tmp_path / "a", steps=4)
    manifest = read_manifest(tmp_path / "a")
    assert manifest is not None and manifest.replaced[0] == first and len(manifest.replaced) == 2
    assert json.loads(store.cat_file(f"{ROOT}/{UPLOADED}"))["run"] == manifest.run
    assert run(tmp_path / "a", steps=5)
    with pytest.raises(ValueError, match=r"where there is a model that this run has not put there"):
        run(tmp_path / "b")


def test_another_runs_model_is_refused_before_anything_is_written(
    tmp_path: Path, store: MemoryFileSystem
) -> None:
    assert run(tmp_path / "a")
    before = texts(store)
    with pytest.raises(ValueError, match=r"^checkpoint\.export_to: found memory://bucket/run, where"):
        run(tmp_path / "b")
    assert not (tmp_path / "b" / "config.yaml").exists() and not (tmp_path / "b" / ".gapo-mega.json").exists()
    assert texts(store) == before


def test_a_failure_at_the_end_keeps_everything_else(
    tmp_path: Path,
    store: MemoryFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("507 Insufficient Storage")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "put_file", full)  # another thread has another store
        with pytest.raises(ValueError, match=r"could not be put to memory://bucket/run \(OSError: 507"):
            run(tmp_path / "a", save_final=False)
    assert (tmp_path / "a" / "hf" / "config.json").is_file() and (tmp_path / "a" / "summary.json").is_file()
    assert "the run can go on from step 2" in caplog.text
    model = snapshot(tmp_path / "a" / "hf")
    assert run(tmp_path / "a", save_final=False)
    assert store.cat_file(f"{ROOT}/config.json") in model.values()


@pytest.mark.parametrize(
    "kept", [{"save_final": True}, {"save_final": False, "every_steps": 1}, {"save_final": False}]
)
def test_a_run_that_is_killed_while_it_puts_its_model_there(
    tmp_path: Path,
    store: MemoryFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kept: dict[str, Any],
) -> None:
    """The same command goes on from its last checkpoint; a run that keeps none says so at the start."""

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt  # as a second Ctrl-C: nothing is tidied up

    warning = "checkpoint.export_to: found with checkpoint.every_steps 0 and save_final false"
    keeps = any(kept.values())
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("gapo_mega.runs.finish.put_from_main", killed)
        run(tmp_path / "a", **kept)
    assert (warning in caplog.text) != keeps
    whole = snapshot(tmp_path / "a" / "hf")
    assert whole and not store.find("/bucket")
    if keeps:
        assert run(tmp_path / "a", **kept)
        assert json.loads(store.cat_file(f"{ROOT}/{UPLOADED}"))["step"] == 2
    else:
        with pytest.raises(ValueError, match=r"where a run has ended \(summary.json, without a checkpoint\)"):
            run(tmp_path / "a", **kept)
        assert snapshot(tmp_path / "a" / "hf") == whole


@pytest.mark.parametrize("save_final", [False, True])
def test_a_failure_after_the_end_took_the_best_policy_is_told_as_it_is(
    tmp_path: Path,
    store: MemoryFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    save_final: bool,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("507 Insufficient Storage")

    settings = {"export_hf": True, "export_to": URL, "save_final": save_final, "best": "worst_gain"}
    sections: dict[str, Any] = {
        "evaluation": {"every_steps": 1},
        "data": {"source": "unused", "heldout_prompts": 3},
    }
    monkeypatch.setattr(MemoryFileSystem, "put_file", full)
    with pytest.raises(ValueError, match="could not be put"):
        start(tmp_path / "a", Exporting(), with_report=True, checkpoint=settings, **sections)
    best = json.loads((tmp_path / "a" / "summary.json").read_text())["step"]
    assert best < 4 and "cut short" not in caplog.text
    assert ("the state after step 4 is gone: the end had taken the best checkpoint" in caplog.text) is (
        not save_final
    )
    assert f"the run can go on from step {4 if save_final else best}" in caplog.text


def test_no_message_repeats_a_password(tmp_path: Path) -> None:
    """Wherever it stands."""
    file = tmp_path / "run.yaml"
    config = configuration(tmp_path / "run").model_dump(mode="json")
    file.write_text(json.dumps(config))
    for url, said in {
        "s3://key:hunter2@bucket/a": "found a password in it, accepted: none",
        "sftp://me:hunter2@host/a": "found a password in it",
        "https://host/a?sig=hunter2": "found the parameter 'sig', accepted: none",
        "simplecache::s3://hunter2/a": "found what is no such address",
        "/mnt/hunter2": "found what is no such address",
        "s3://": "found what is no such address",
    }.items():
        file.write_text(json.dumps({**config, "checkpoint": {"export_to": url}}))
        with pytest.raises(ValueError, match=r"^(in )?checkpoint\.export_to: ") as caught:
            load(file)
        assert said in str(caught.value) and "hunter2" not in str(caught.value)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        load(file, ["checkpoint.export_to=s3://key:hunter2@bucket/a", "checkpoint.export_hf=true"])
    assert "hunter2" not in str(caught.value) and "override 'checkpoint.export_to=***'" in str(caught.value)
    with pytest.raises(ValueError, match=r"^checkpoint\.export_to: found with checkpoint\.export_hf"):
        load(file, ["checkpoint.export_to=s3://bucket/a"])
    for url in ("abfs://container@account.dfs.core.windows.net/a", "sftp://me@host/a", "s3://bucket/a/"):
        found = load(file, [f"checkpoint.export_to={url}", "checkpoint.export_hf=true"])
        assert found.checkpoint.export_to == url.rstrip("/")


def test_ranks_that_wait_for_the_upload_get_on(tmp_path: Path) -> None:
    """How long it takes is the main rank's matter."""

    class Waiting(FakeEngine):
        seen = 0

        def broadcast_in_replica(self, value: Any) -> Any:
            """As the main rank, whose upload is seen to be under way three times."""
            self.seen += 1
            return self.seen <= 3 if isinstance(value, bool) else value

    before = moves()
    put_from_main(Export(URL, ["a"]), tmp_path, 1, Waiting(layout(rank=1, world=2)))
    assert moves() == before + 3


def texts(store: MemoryFileSystem) -> dict[str, bytes]:
    return {name: store.cat_file(name) for name in store.find("/bucket")}
