"""A sweep as a Slurm array job."""

from __future__ import annotations

import shlex
from pathlib import Path

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={nproc}
#SBATCH --cpus-per-task={cores}
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output={logs}/%x-%A_%a.log

# Submit from the directory that the sweep's paths are relative to, with the virtual environment active:
{submit}
# One task is one point. Five minutes before the time limit it gets SIGTERM and writes a checkpoint, and the
# same job, submitted again, goes on with the points that have not ended. Then, or meanwhile, for the results:
#   gapo-mega sweep {arguments} --collect

set -euo pipefail

srun gapo-mega sweep {arguments} --point "${{POINT:-$SLURM_ARRAY_TASK_ID}}"
"""
_PLAIN = "#   sbatch FILE"
_AFTER = """\
#   warm=$(sbatch --parsable --array=0 --export=ALL,POINT=warm_start FILE)
#   sbatch --dependency=afterok:"${warm%%;*}" FILE"""
_CORES = 8  # for every process


def script(*, name: str, logs: Path, arguments: str, points: int, nproc: int | None, warm_start: bool) -> str:
    """The job's text.

    Args:
        name: of the job.
        logs: the folder of its output, which has to be there when it is submitted.
        arguments: of ``gapo-mega sweep``, quoted for a shell.
        points: of the sweep.
        nproc: processes, and GPUs, of a point.
        warm_start: whether all points wait for one.
    """
    submit = f"#   mkdir -p {shlex.quote(str(logs))}\n{_AFTER if warm_start else _PLAIN}"
    return _SCRIPT.format(
        name="".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name),
        last=points - 1,
        nproc=nproc or 1,
        cores=_CORES * (nproc or 1),
        logs=shlex.quote(str(logs)),
        submit=submit,
        arguments=arguments,
    )
