"""examples/gapo_mistral7b.sh under torchrun with two processes, on a tiny random Mistral, end to end."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.environment import ROOT
from tests.helpers.tiny import byte_tokenizer, safe_rlhf_model, tiny_chat_model

SCRIPT = ROOT / "examples" / "gapo_mistral7b.sh"


def test_script_under_torchrun(tmp_path: Path, smollm2: Path) -> None:
    """TP2 through the environment; everything that makes the run small by overrides."""
    tiny_chat_model(tmp_path / "model", smollm2, family="mistral")
    for name in ("reward", "cost"):  # as the beaver models are: Llama, and another tokenizer
        safe_rlhf_model(tmp_path / name, name)
        byte_tokenizer(tmp_path / name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i} words."}) + "\n" for i in range(20)))
    overrides = [
        "steps=1",
        "micro_batch_size=2",
        "model.dtype=fp32",
        "model.recompute=none",
        f"data.source={prompts}",
        "data.heldout_source=null",
        "data.heldout_prompts=2",
        "data.max_prompt_tokens=100",
        "rollout.prompts_per_step=4",
        "rollout.max_new_tokens=6",
        "checkpoint.every_steps=0",
        "logging.tensorboard=false",
        *(f"objectives.{i}.options.dtype=fp32" for i in range(2)),
        *(f"objectives.{i}.options.max_tokens=128" for i in range(2)),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TP": "2",
        "PP": "1",
        "MODEL": str(tmp_path / "model"),
        "REWARD": str(tmp_path / "reward"),
        "COST": str(tmp_path / "cost"),
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    command += ["--nproc_per_node", "2", str(SCRIPT), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 1 and "critic_loss/1" in records[0]
    assert all(math.isfinite(records[0][f"reward/{name}"]) for name in ("helpful", "harmless"))
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()


NUMBERS = ["NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_PORT", "MAX_RESTARTS"]
OF_SLURM = ["SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_JOB_ID"]


@pytest.mark.parametrize("name", [*NUMBERS, *OF_SLURM])
@pytest.mark.parametrize("value", ["x[$(touch WAS_RUN)0]", "2; touch WAS_RUN", "-1", "1e3", " 2", "9" * 30])
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_the_script_takes_digits_only(tmp_path: Path, name: str, value: str, arguments: list[str]) -> None:
    """Bash runs commands that stand in a variable which it uses in arithmetic."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, name: value.replace("WAS_RUN", str(tmp_path / "was run")), "PYTHON": "false"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name}: found '") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_the_script_are_decimal(tmp_path: Path) -> None:
    """Also with zeros in front, which mean octal numbers to bash."""
    (tmp_path / "shown").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "shown").chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run"],
        env={**os.environ, "NNODES": "08", "NPROC_PER_NODE": "010", "PYTHON": str(tmp_path / "shown")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split()[1:3] == ["--world", "80"], done.stderr


def launched(folder: Path, *arguments: str, **variables: str) -> tuple[list[str], str]:
    """What the script starts, or that it starts nothing, and its errors."""
    stand_ins = {
        "shown": 'printf "%s\\n" "$@"',
        "scontrol": 'test "$*" = "show hostnames n[1-2]" && echo n1 && seq 2 20000',  # more than a pipe holds
    }
    for name, line in stand_ins.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "NNODES", "NODE_RANK"))
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=clean
        | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "shown"), "NPROC_PER_NODE": "4"}
        | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (2 if done.stderr else 0), done.stderr
    return done.stdout.splitlines(), done.stderr


WORKERS = ["--nproc-per-node", "4", "--max-restarts", "0", str(SCRIPT), "steps=3"]
SLURM = {
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "123456",
}


def across(nodes: str, rank: str, address: str, port: str) -> list[str]:
    meeting = ["--nnodes", nodes, "--node-rank", rank, "--master-addr", address, "--master-port", port]
    return ["-m", "torch.distributed.run", *meeting, *WORKERS]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["-m", "gapo_mega.runs.local_torchrun", *WORKERS]),
        ({"MASTER_PORT": "1234"}, across("1", "0", "127.0.0.1", "1234")),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, across("2", "1", "a", "29500")),
        (
            {"NNODES": "02", "NODE_RANK": "00", "MASTER_ADDR": "a", "MASTER_PORT": "08"},
            across("2", "0", "a", "8"),
        ),
        (SLURM, across("2", "1", "n1", "23456")),
        (SLURM | {"SLURM_NODEID": "0"}, across("2", "0", "n1", "23456")),
        (SLURM | {"NODE_RANK": "0", "MASTER_ADDR": "b", "MASTER_PORT": "7"}, across("2", "0", "b", "7")),
        (SLURM | {"NNODES": "1"}, ["-m", "gapo_mega.runs.local_torchrun", *WORKERS]),
        # In a job of several nodes, but started by no srun: on this node alone.
        (
            {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"},
            ["-m", "gapo_mega.runs.local_torchrun", *WORKERS],
        ),
    ],
)
def test_the_script_starts_torchrun_on_one_node_and_on_several(
    tmp_path: Path, variables: dict[str, str], expected: list[str]
) -> None:
    assert launched(tmp_path, "steps=3", **variables) == (expected, "")


def test_the_script_takes_restarts(tmp_path: Path) -> None:
    started, _ = launched(tmp_path, MAX_RESTARTS="03")
    assert started[started.index("--max-restarts") + 1] == "3"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK: found '' with NNODES 2, accepted: 0 to 1, "),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK: found '2' with NNODES 2"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: found '' with NNODES 2, accepted: the host name"),
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "8"},
            "SLURM_STEP_NUM_TASKS: found 8 on 2 nodes, accepted: one task",
        ),
    ],
)
def test_what_the_script_cannot_know_is_refused_in_one_line(
    tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    started, said = launched(tmp_path, **variables)
    assert not started and said.startswith(f"error: {message}") and said.count("\n") == 1
