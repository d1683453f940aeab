"""``gapo-mega audit`` and the directory that it writes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapo_mega.commands.audit import audit
from gapo_mega.runs.lock import DirectoryLock
from gapo_mega.runs.recorded_config import record_config
from tests.helpers.fake_runs import configuration, trainer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    assert trainer(tmp_path / "run").run()
    return tmp_path / "run"


def test_a_run_that_is_still_going_can_be_audited(run: Path) -> None:
    with DirectoryLock(run, "gapo-mega train"):
        audit(run, None, None)
        audit(run, None, None)  # its own files are written again
    assert {path.name for path in (run / "audit").iterdir()} == {"audit.csv", "audit.png"}


def test_two_audits_at_once(run: Path) -> None:
    with (
        DirectoryLock(run / "audit", "gapo-mega audit", "--out"),
        pytest.raises(ValueError, match=r"^--out: found .*, which is in use by gapo-mega audit"),
    ):
        audit(run, None, None)
    with DirectoryLock(run, "gapo-mega train"), pytest.raises(ValueError, match="in use by gapo-mega train"):
        audit(run, None, run)


@pytest.mark.parametrize("name", ["audit.csv", "audit.png"])
def test_somebody_elses_file_stays(run: Path, name: str) -> None:
    out = run.parent / "out"
    out.mkdir()
    (out / name).write_text("mine\n")
    with pytest.raises(ValueError, match=rf"^--out: found .*{name}, which no audit has written"):
        audit(run, None, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: "mine\n"}


def test_a_refused_audit_leaves_nothing_behind(run: Path) -> None:
    with pytest.raises(ValueError, match="--method"):
        audit(run, ["nobody"], run.parent / "new" / "out")
    with pytest.raises(ValueError, match="not found, accepted: a directory that a run has written"):
        audit(run.parent / "nowhere", None, None)
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_the_runs_configuration_is_read_and_not_the_users(run: Path) -> None:
    (run / "config.yaml").write_text("# no configuration of a run\n")
    record_config(configuration(run), run)
    audit(run, None, None)
    assert (run / "audit" / "audit.csv").stat().st_size > 0
