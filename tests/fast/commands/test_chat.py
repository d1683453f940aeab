"""What the command refuses before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.here import Here
from tests.helpers.run_files import write_run_file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_file(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "GAPO_MEGA_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return Here(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scores",), "--config: found none beside --scores, accepted: the YAML file of a run"),
        (("seed=2",), "--config: found none beside seed=2, accepted: the YAML file of a run"),
        (("--temperature", "nan"), "--temperature: found nan, accepted: 0 (the most likely token) or more"),
        (("--temperature", "inf"), "--temperature: found inf, accepted: 0 (the most likely token) or more"),
        (("--top-p", "0"), "--top-p: found 0.0, accepted: above 0, at most 1"),
        (("--repetition-penalty", "-1"), "--repetition-penalty: found -1.0, accepted: above 0"),
        (("--dtype", "fp16"), "--dtype: found 'fp16', accepted: fp32, bf16"),
    ],
)
def test_options(file: Path, here: Here, arguments: tuple[str, ...], message: str) -> None:
    assert here.refused("chat", "--model", str(file.parent / "model"), *arguments) == message


def test_models(file: Path, here: Here, tmp_path: Path) -> None:
    found = here.refused("chat", "--model", str(tmp_path / "absent"))
    assert found.startswith(f"--model: found '{tmp_path / 'absent'}', which is neither a local directory")
    found = here.refused("chat", "--model", f"a={file.parent / 'model'}", "--model", f"a={tmp_path}")
    assert found == "--model: found two models called 'a', accepted: NAME=PATH with names that differ"
    (tmp_path / "config.json").write_text("{}")
    assert here.refused("chat", "--model", str(tmp_path)).startswith(f"--model {tmp_path}: ")


def test_several_processes(file: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    found = here.refused("chat", "--model", str(file.parent / "model"))
    assert found == "chat: found 2 processes of torchrun, accepted: one, without torchrun"


def test_help_shows_defaults(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets are no markup."""
    monkeypatch.setenv("COLUMNS", "200")
    for command, default in (("chat", "[that of --config, or 1]"), ("evaluate", "[output_dir/evaluation]")):
        code, out, _ = here(command, "--help")
        assert code == 0 and default in out
