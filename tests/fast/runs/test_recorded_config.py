"""The run's configuration beside one of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gapo_mega.config import Config
from gapo_mega.config.loading import load
from gapo_mega.evaluation.files import config_file
from gapo_mega.runs.recorded_config import check_config_files, is_ours, record_config, remove_config
from tests.helpers.fake_runs import configuration


def test_a_run_writes_its_configuration_and_writes_it_again(tmp_path: Path) -> None:
    for steps in (4, 9):
        config = configuration(tmp_path, steps=steps)
        path = record_config(config, tmp_path)
        assert path == tmp_path / "config.yaml" == config_file(tmp_path) and is_ours(path)
        assert path.read_text().startswith("# Written by gapo-mega")
        assert path.stat().st_mode & 0o777 == 0o600
        assert Config.model_validate(yaml.safe_load(path.read_text())) == config == load(path)
    assert [found.name for found in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("kind", ["user's", "edited", "comment added", "line ends", "empty", "broken"])
def test_the_users_own_file_stays_byte_for_byte(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "config.yaml"
    record_config(configuration(tmp_path), tmp_path)
    written = own.read_bytes()
    content = {
        "user's": b"# mine\nsteps: 3\n",
        "edited": written.replace(b"steps: 4", b"steps: 5"),
        "comment added": written + b"# remember this one\n",
        "line ends": written.replace(b"\n", b"\r\n"),
        "empty": b"",
        "broken": b"\xff\xfe",
    }[kind]
    own.write_bytes(content)
    assert not is_ours(own)
    for steps in (7, 8):
        config = configuration(tmp_path, steps=steps)
        assert record_config(config, tmp_path) == tmp_path / "config.resolved.yaml"
        assert own.read_bytes() == content
        # Readers of a run's directory take the run's.
        assert load(config_file(tmp_path)) == config
    assert "config.yaml is not as a run has written it" in caplog.text
    remove_config(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["config.yaml"]


def test_a_link_to_the_users_file_stays(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("steps: 3\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").symlink_to(mine)
    record_config(configuration(run), run)
    assert (run / "config.yaml").is_symlink() and mine.read_text() == "steps: 3\n"


def test_when_the_users_file_has_gone_the_other_name_goes_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# mine\n")
    record_config(configuration(tmp_path), tmp_path)
    (tmp_path / "config.yaml").unlink()
    record_config(configuration(tmp_path), tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["config.yaml"]


def test_a_resolved_file_of_the_users_is_refused(tmp_path: Path) -> None:
    check_config_files(tmp_path)
    (tmp_path / "config.resolved.yaml").write_text("mine: true\n")
    with pytest.raises(ValueError, match=r"^output_dir: found .*config\.resolved\.yaml, which no run has"):
        check_config_files(tmp_path)
