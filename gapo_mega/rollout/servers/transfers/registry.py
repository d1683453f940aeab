"""Transfers by their names in ``rollout.vllm.transfer``."""

from __future__ import annotations

from gapo_mega.rollout.servers.transfers.base import Transfer
from gapo_mega.rollout.servers.transfers.files import Files
from gapo_mega.rollout.servers.transfers.ipc import Ipc
from gapo_mega.rollout.servers.transfers.nccl import Nccl

TRANSFERS: dict[str, type[Transfer]] = {"files": Files, "nccl": Nccl, "ipc": Ipc}
