"""Output directories through the commands: one owner, finished runs, the user's own files, several ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gapo_mega.runs.lock import LOCK_FILE, OWNER_FILE, DirectoryLock
from tests.helpers.commands import Command
from tests.helpers.environment import environment
from tests.helpers.tiny import tiny_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    folder = tmp_path_factory.mktemp("directories")
    tiny_chat_model(folder / "model", smollm2)
    lines = [json.dumps({"prompt": f"What is {i} plus {7 * i}?"}) for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_config(folder: Path, path: Path, **changes: Any) -> Path:
    config = {
        "output_dir": str(folder / path.stem),
        "steps": 2,
        "micro_batch_size": 2,
        "model": {"path": str(folder / "model")},
        "data": {"source": str(folder / "prompts.jsonl"), "heldout_prompts": 2, "max_prompt_tokens": 80},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
        "objectives": [
            {"name": "short", "function": "tests.helpers.rewards:short"},
            {"name": "vowels", "function": "tests.helpers.rewards:vowels"},
        ],
        "logging": {"tensorboard": False, "progress": False},
        **changes,
    }
    path.write_text("# A comment of the user's.\n" + yaml.safe_dump(config))
    return path


def output_of(command: Command, code: int = 0) -> str:
    output, _ = command.communicate()
    assert command.returncode == code, output[-6000:]
    return output


def error_of(command: Command) -> str:
    """The one line of a refusal, which ends the command before it has begun."""
    (line,) = [line for line in output_of(command, 2).splitlines() if line.startswith("error: ")]
    return line


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_directory_in_use_is_refused_in_every_way_to_start(folder: Path) -> None:
    """By one process, by local processes, and by workers of a torchrun of the user's."""
    config = write_config(folder, folder / "busy.yaml")
    run = folder / "busy"
    train = ("train", "--config", config)
    with DirectoryLock(run, "gapo-mega train"):
        owner = f"process {os.getpid()} on host {socket.gethostname()}"
        for options in ((), ("--nproc", 2)):
            assert owner in error_of(Command(*train, *options))
        words = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "gapo_mega.cli",
        ]
        done = subprocess.run(
            [sys.executable, *words, *map(str, train)],
            env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode != 0 and owner in done.stderr
        assert {path.name for path in run.iterdir()} == {LOCK_FILE, OWNER_FILE}
    assert not run.exists()


def test_a_finished_run_needs_overwrite_and_the_users_files_stay(folder: Path) -> None:
    run = folder / "whole"
    run.mkdir()
    own = write_config(folder, run / "config.yaml", output_dir=str(run))
    content = own.read_bytes()
    output = output_of(Command("train", "--config", own))
    assert f"the run's configuration is in {run / 'config.resolved.yaml'}" in output
    assert own.read_bytes() == content
    assert not {LOCK_FILE, OWNER_FILE} & {path.name for path in run.iterdir()}
    (run / "notes.txt").write_text("mine")

    model = (run / "hf" / "model.safetensors").read_bytes()
    line = error_of(Command("train", "--config", own, "steps=5"))
    assert f"output_dir: found {run}, where a run has ended" in line and "--overwrite" in line
    assert (run / "hf" / "model.safetensors").read_bytes() == model and steps_of(run) == [1, 2]

    assert "every method" in output_of(Command("audit", run))
    output_of(Command("train", "--config", own, "--nproc", 2, "--overwrite", "seed=7", "optimizer.lr=1e-3"))
    assert (run / "hf" / "model.safetensors").read_bytes() != model and steps_of(run) == [1, 2]
    assert own.read_bytes() == content and (run / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((run / "config.resolved.yaml").read_text())["seed"] == 7
    assert not (run / "audit").exists()


def test_two_ranks_in_two_working_directories(folder: Path, tmp_path: Path) -> None:
    """A relative output_dir is another place for each; both end with the same line, and neither waits."""
    config = write_config(folder, folder / "relative.yaml", output_dir="relative")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        variables = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(Command("train", "--config", config, cwd=tmp_path / rank, **variables))
    first, second = map(error_of, ranks)
    assert first == second
    assert (
        f"output_dir: rank 0 writes to {tmp_path / '0' / 'relative'}, which another rank does not see"
        in first
    )
    assert not (tmp_path / "0" / "relative").exists() and not (tmp_path / "1" / "relative").exists()


def test_two_ranks_train_over_the_environment(folder: Path) -> None:
    """What ranks agree on before the engine is there leaves the port to the engine."""
    config = write_config(folder, folder / "env.yaml", checkpoint={"save_final": True, "export_hf": False})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(Command("train", "--config", config, **variables))
    for process in ranks:
        output_of(process)
    assert steps_of(folder / "env") == [1, 2]
    line = error_of(Command("train", "--config", config, "--nproc", 2, "steps=3", "algorithm.kl_beta=0.9"))
    assert "algorithm.kl_beta: found 0.9, but" in line and "was written with 0.05" in line
    shutil.rmtree(folder / "env")


@pytest.mark.parametrize("kind", ["sft", "train-reward"])
def test_supervised_commands_too(folder: Path, kind: str) -> None:
    question = "\n\nHuman: May I have {} of them?\n\nAssistant:"
    rows = [
        {"chosen": question.format(i) + f" yes, {i}", "rejected": question.format(i) + f" no, {i}"}
        for i in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "output_dir": str(folder / kind),
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_steps": 1,
        "model": {"path": str(folder / "model"), "max_tokens": 100},
        "data": {"source": str(folder / "pairs.jsonl"), "heldout_fraction": 0.2},
        "logging": {"tensorboard": False, "progress": False},
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(config))
    output_of(Command(kind, "--config", path))
    for options in ((), ("--nproc", 2)):
        assert "where a run has ended" in error_of(Command(kind, "--config", path, *options))
    output_of(Command(kind, "--config", path, "--overwrite", "seed=3"))
    assert yaml.safe_load((folder / kind / "config.yaml").read_text())["seed"] == 3
