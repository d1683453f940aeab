"""The processes of a command: local ones started through ``torch.distributed.run``, and what each may say."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from gapo_mega.planning.world import other_launcher, read_world


def under_torchrun() -> bool:
    """Whether this process is one of a torchrun job already."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_under_torchrun(processes: int) -> None:
    """Raise ``ValueError`` where ``--nproc`` was given to a process of a torchrun job."""
    if under_torchrun():
        raise ValueError(
            f"--nproc: found {processes} inside torchrun, which has started the processes already (it sets "
            "TORCHELASTIC_RUN_ID)"
        )


def start(processes: int, arguments: Sequence[str]) -> NoReturn:
    """Become a torchrun of ``processes`` local workers that run ``gapo-mega`` with ``arguments``.

    Torchrun replaces this process, so that signals are torchrun's own; it ends as its workers have ended.
    All of them listen on this machine's loopback alone, at free ports.
    """
    assert processes >= 1
    # Otherwise each worker would use every core, and they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    # After SIGTERM the workers write a checkpoint; torchrun would kill them after 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "240")
    command = [
        *(sys.executable, "-m", "gapo_mega.runs.local_torchrun", "--nproc-per-node", str(processes)),
        *("-m", "gapo_mega.cli", *arguments),
    ]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def available_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quiet_other_ranks() -> None:
    """Let rank 0 report progress, and every rank its errors.

    Raises ``ValueError`` for a launcher's variables that do not fit together. Ranks that torchrun did not
    start also say what they wait for.
    """
    main_rank = read_world(to_meet=True).rank == 0
    logging.basicConfig(
        level=logging.WARNING if main_rank or not under_torchrun() else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if main_rank:
        logging.getLogger("gapo_mega").setLevel(logging.INFO)
        # Megatron says at every import which accelerators are missing; `gapo-mega info` says it once.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        # Of Megatron's optimizer, too; without a GPU its calls of torch pass through a module of ours.
        message = r"The \.grad attribute of a Tensor that is not a leaf"
        warnings.filterwarnings("ignore", message, module=r"gapo_mega\.engine\.megatron\.runtime\.cpu")
        notice = other_launcher()
        if notice is not None:
            logging.getLogger(__name__).warning("%s", notice)
    else:
        warnings.simplefilter("ignore")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
