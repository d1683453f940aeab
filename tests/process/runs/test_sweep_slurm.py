"""A Slurm job's text, run by a shell with programs that only say what they were asked."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from gapo_mega.runs.sweep_slurm import script


@pytest.mark.parametrize(("variables", "point"), [({}, "4"), ({"POINT": "warm_start"}, "warm_start")])
def test_a_task_runs_its_point(tmp_path: Path, variables: dict[str, str], point: str) -> None:
    arguments = ["--config", "a sweep's.yaml", "seeds=[1, 2]"]
    text = script(
        name="s",
        logs=tmp_path / "some logs",
        arguments=shlex.join(arguments),
        points=6,
        nproc=2,
        warm_start=True,
    )
    for name, body in (("srun", '"$@"'), ("gapo-mega", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "4",
        **variables,
    }
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["sweep", *arguments, "--point", point]
