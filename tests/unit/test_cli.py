"""The command line: what it prints, refuses and starts."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from gapo_mega import ops
from gapo_mega.config import Config
from tests.tiny import tiny_llama

CONFIG = """
output_dir: {output}
model: {{path: {model}}}
data: {{source: "package:prompts", max_prompt_tokens: 64}}
rollout: {{max_new_tokens: 16}}
objectives:
  - {{name: concise, function: "gapo_mega.objectives_demo:concise"}}
  - {{name: on_topic, function: "gapo_mega.objectives_demo:on_topic"}}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    tiny_llama(directory / "model")
    path = directory / "run.yaml"
    path.write_text(CONFIG.format(output=directory / "run", model=directory / "model"))
    return path


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gapo_mega.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def refused(*arguments: str, **environment: str) -> str:
    """The one line that a user error prints."""
    done = command(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_help_and_version() -> None:
    top, train = command("--help"), command("train", "--help")
    assert top.returncode == train.returncode == 0
    for name in ("train", "convert", "info"):
        assert name in top.stdout
    for option in ("--config", "--nproc", "--dry-run", "--world"):
        assert option in train.stdout
    assert command("--version").stdout == f"gapo-mega {version('gapo-mega')}\n"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from gapo_mega.cli import app\n"
        "try: app(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'datasets', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_info_says_what_is_installed() -> None:
    done = command("info")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert f"isa {ops.info()['isa']}" in done.stdout
    assert "transformer-engine" in done.stdout and "apex" in done.stdout


def test_dry_run_prints_a_configuration_layout_and_memory(file: Path) -> None:
    done = command(
        "train", "--config", str(file), "--dry-run", "--world", "4", "parallel.pipeline=2", "seed=9"
    )
    assert done.returncode == 0, done.stderr
    config = Config.model_validate(yaml.safe_load(done.stdout))
    assert (config.seed, config.parallel.pipeline, config.rollout.max_new_tokens) == (9, 2, 16)
    assert "# layout: 4 processes = tensor 1 x pipeline 2 x data 2" in done.stdout
    assert "# step: 8 prompts x 4 samples = 32 sequences, 16 on a data-parallel rank" in done.stdout
    assert "stage 0     stage 1" in done.stdout
    assert not Path(config.output_dir).exists()


def test_user_errors_are_one_line(file: Path) -> None:
    given = ("train", "--config", str(file), "--dry-run")
    assert "rollout.temprature: unknown key, the nearest is 'temperature'" in refused(
        *given, "rollout.temprature=1"
    )
    assert "parallel: found tensor 2 x pipeline 1 = 2 processes on a world of 3" in refused(
        *given, "--world", "3", "parallel.tensor=2"
    )
    assert "model.path: found '/nowhere'" in refused(*given, "model.path=/nowhere")
    assert "objective 'concise'" in refused(*given, "objectives.0.function=gapo_mega.objectives_demo:concize")
    assert "--world: found 2 without --dry-run" in refused("train", "--config", str(file), "--world", "2")
    inside = refused("train", "--config", str(file), "--nproc", "2", TORCHELASTIC_RUN_ID="x")
    assert "--nproc: found 2 inside torchrun" in inside


def test_errors_show_where_they_were_raised_on_demand(file: Path) -> None:
    done = command("train", "--config", str(file), "--dry-run", "sed=1", GAPO_MEGA_TRACEBACK="1")
    assert "Traceback" in done.stderr and "ValueError: sed: unknown key" in done.stderr


def test_convert_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    for source, found in (("absent.gguf", "not found"), ("model.bin", "no .gguf file"), (".", "a directory")):
        line = refused("convert", "--from", str(tmp_path / source), "--to", str(tmp_path / "out"))
        assert found in line and "accepted: a .gguf file" in line


def test_nproc_checks_before_it_starts_processes(file: Path) -> None:
    line = refused("train", "--config", str(file), "--nproc", "3")
    assert "rollout.prompts_per_step: found 8, accepted for 3 data-parallel ranks" in line


def test_nproc_starts_that_many_ranks_with_their_share_of_the_cores(tmp_path: Path) -> None:

    script = "from gapo_mega.launch import start; start(2, ['--version'])"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"gapo-mega {version('gapo-mega')}\n" * 2
    assert "OMP_NUM_THREADS" not in done.stderr  # torchrun warns where it has to choose the number itself
