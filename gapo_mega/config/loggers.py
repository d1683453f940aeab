"""One entry of ``logging.loggers``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from gapo_mega.config.fields import Code, Section


class LoggerConfig(Section):
    """A place that shows the run; ``options`` are its own."""

    name: Code = Field(description="a logger of gapo_mega.runs.loggers, or a class of one's own")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the logger")


def _once(loggers: list[LoggerConfig]) -> list[LoggerConfig]:
    names = [logger.name for logger in loggers]
    if len(set(names)) != len(names):
        raise ValueError(f"found {', '.join(names)}, accepted: every name once")
    return loggers


Loggers = Annotated[list[LoggerConfig], AfterValidator(_once)]
