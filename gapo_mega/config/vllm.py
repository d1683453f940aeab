"""The section ``rollout.vllm``."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from gapo_mega.config.fields import LocalPath, Section


def _address(url: str) -> str:
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url) is None:
        raise ValueError(f"found {url!r}, accepted: http://HOST:PORT, without user, query and fragment")
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
    environment: dict[str, str] = Field(
        {}, description="variables of a server that the run starts, such as CUDA_VISIBLE_DEVICES"
    )
    weights_directory: LocalPath | None = Field(
        None,
        description="where weights are put for the servers, a piece at a time; none: shared memory, for "
        "servers of the same machine",
    )
    piece_mib: int = Field(256, ge=1, le=65_536, description="MiB of weights in a piece")
    timeout: float = Field(
        1200.0, gt=0, le=1500, description="longest time of one request in seconds, such as a whole response"
    )
    patience: float = Field(
        60.0,
        ge=0,
        le=1500,
        description="for how many seconds a server may be away before its rollout is repeated",
    )
    start_timeout: float = Field(
        600.0, gt=0, le=1500, description="for how many seconds a server that starts is waited for"
    )

    @property
    def urls(self) -> list[str]:
        """All addresses; none without ``url``."""
        if self.url is None:
            return []
        return [self.url] if isinstance(self.url, str) else list(self.url)
