"""What ``rollout.backend: vllm`` cannot work with. All raise a ``ValueError`` of one line."""

from __future__ import annotations

import os

from gapo_mega.config import Config
from gapo_mega.files import local
from gapo_mega.rollout.servers.transfers.registry import TRANSFERS

# Of parallel.timeout_minutes: what is left is for what stands before and after a wait.
_SHARE = 5 / 6


def check_settings(config: Config) -> None:
    """Refuse settings that do not fit together."""
    rollout = config.rollout
    if (rollout.vllm.python is None) == (not rollout.vllm.urls):
        found = "neither" if rollout.vllm.python is None else "both"
        raise ValueError(
            f"rollout.vllm: found {found} of python and url with rollout.backend vllm, accepted: one of "
            "them (the Python of an environment with vLLM, or where servers answer)"
        )
    if rollout.top_p != 1.0 and not rollout.top_k:
        raise ValueError(
            f"rollout.top_p: found {rollout.top_p} with rollout.backend vllm and no rollout.top_k, "
            "accepted: 1, or a top_k beside it (the trainer must know which tokens were left to draw "
            "from, and an answer names few)"
        )
    if rollout.vllm.sleep and rollout.ahead:
        raise ValueError(
            f"rollout.vllm.sleep: found true with rollout.ahead {rollout.ahead}, accepted: false, or ahead 0 "
            "(servers that answer beside the training never sleep)"
        )
    transfer, directory = rollout.vllm.transfer, rollout.vllm.weights_directory
    if transfer != "files" and directory is not None:
        raise ValueError(
            f"rollout.vllm.weights_directory: found {directory} with rollout.vllm.transfer {transfer}, "
            "accepted: none (no file is written)"
        )
    TRANSFERS[transfer].check(config)
    _check_waits(config)


def _check_waits(config: Config) -> None:
    """Other ranks are in a collective while one waits for servers."""
    vllm, minutes = config.rollout.vllm, config.parallel.timeout_minutes
    waits = {"timeout": vllm.timeout, "patience": vllm.patience, "start_timeout": vllm.start_timeout}
    most = _SHARE * minutes * 60
    for name, seconds in waits.items():
        if seconds > most:
            raise ValueError(
                f"rollout.vllm.{name}: found {seconds:g} with parallel.timeout_minutes {minutes:g}, "
                f"accepted: up to {most:g} seconds, five sixths of that (other ranks wait meanwhile)"
            )


def check_python(python: str) -> None:
    """Refuse a Python that is not there, and one of a job on several machines."""
    if not local(python).is_file():
        raise ValueError(
            f"rollout.vllm.python: file {python} not found, accepted: the Python of an environment with vLLM "
            "(docs/rollouts.md)"
        )
    everywhere = os.environ.get("WORLD_SIZE")
    here = os.environ.get("LOCAL_WORLD_SIZE", everywhere)
    if here != everywhere:
        raise ValueError(
            f"rollout.vllm.python: found {python} in a job of {everywhere} processes, {here} of them on this "
            "machine; accepted: rollout.vllm.url (a server that the run starts answers on its machine alone)"
        )
