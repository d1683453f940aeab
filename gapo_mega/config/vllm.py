"""The section ``rollout.vllm``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gapo_mega.config.fields import LocalPath, Section
from gapo_mega.option_checks import shown, without_password


def _address(url: str) -> str:
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url) is None:
        found = shown(without_password(url), 200)
        raise ValueError(f"found {found}, accepted: http://HOST:PORT, without user, query and fragment")
    return url.rstrip("/")


Address = Annotated[str, AfterValidator(_address)]


class VllmConfig(Section):
    """Of ``rollout.backend`` vllm: a server that the run starts, or servers that are there."""

    python: LocalPath | None = Field(
        None,
        description="Python of an environment with vLLM: the run starts a server with it and "
        "ends it, on this machine",
    )
    url: Address | Annotated[list[Address], Field(min_length=1)] | None = Field(
        None, description="where servers answer that were started for this; data-parallel ranks share several"
    )
    arguments: list[str] = Field(
        [], description="further arguments of a server that the run starts, such as --enforce-eager"
    )
    replicas: int = Field(
        1, ge=1, le=64, description="servers that the run starts; data-parallel ranks share them"
    )
    environment: dict[str, str | list[str]] = Field(
        {},
        description="variables of servers that the run starts, such as CUDA_VISIBLE_DEVICES; a list has a "
        "value for each of the replicas; secrets are given as 'env:NAME', a variable of the run, or "
        "'file:PATH', the text of a file",
    )
    transfer: Literal["files", "nccl", "ipc"] = Field(
        "files",
        description="how weights get to the servers: as files in shared memory or weights_directory, by "
        "NCCL to other GPUs, or by CUDA IPC to servers on rank 0's own GPU",
    )
    weights_directory: LocalPath | None = Field(
        None,
        description="where weights are put with transfer files, a piece at a time; none: shared memory, for "
        "servers of the same machine",
    )
    piece_mib: int = Field(256, ge=1, le=65_536, description="MiB of weights in a piece")
    sleep: bool = Field(
        False,
        description="servers free the memory of weights and cache after every rollout, for a training on the "
        "same GPUs, and get the weights anew before the next; not with rollout.ahead",
    )
    timeout: float = Field(
        1200.0,
        gt=0,
        description="longest time of one request in seconds, such as a whole response, and of an update of "
        "the weights; as the next two, at most five sixths of parallel.timeout_minutes",
    )
    patience: float = Field(
        60.0,
        ge=0,
        description="for how many seconds a server may be away before its rollout is repeated",
    )
    start_timeout: float = Field(
        600.0, gt=0, description="for how many seconds a server that starts is waited for"
    )

    @model_validator(mode="after")
    def _has_a_value_for_each(self) -> VllmConfig:
        if self.replicas > 1 and self.python is None:
            raise ValueError(
                f"rollout.vllm.replicas: found {self.replicas} without rollout.vllm.python, accepted: 1 "
                "(with that Python the run starts servers)"
            )
        for name, value in self.environment.items():
            if isinstance(value, list) and len(value) != self.replicas:
                raise ValueError(
                    f"rollout.vllm.environment.{name}: found {len(value)} values, accepted: one text, or one "
                    f"for each of the {self.replicas} replicas (rollout.vllm.replicas)"
                )
        return self

    def environment_of(self, replica: int) -> dict[str, str]:
        """Variables of the server of that number, from 0."""
        return {
            name: value if isinstance(value, str) else value[replica]
            for name, value in self.environment.items()
        }

    @property
    def urls(self) -> list[str]:
        """All addresses; none without ``url``."""
        if self.url is None:
            return []
        return [self.url] if isinstance(self.url, str) else list(self.url)
