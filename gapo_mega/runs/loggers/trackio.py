"""Trackio: a database on this machine, or a Space of Hugging Face."""

from __future__ import annotations

import importlib
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gapo_mega import optional
from gapo_mega.optional import Probe
from gapo_mega.runs.loggers.base import About, Logger, Outcome, require_text


@dataclass(kw_only=True)
class Trackio(Logger):
    """A run of a project, which a resumed process goes on with. ``space_id`` names a Space to log to.

    Steps repeated after a kill stay there twice; ``metrics.jsonl`` has them once.
    """

    name: ClassVar[str] = "trackio"

    project: str = "gapo_mega"
    space_id: str | None = None
    _module: Any = field(default=None, init=False, repr=False)
    _run: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require_text("project", self.project)
        require_text("space_id", self.space_id, none=True)

    @classmethod
    def probe(cls) -> Probe:
        return optional.trackio()

    def start(self, about: About) -> None:
        goes_on = about.step > 0 and about.remembered is not None
        # Runs of a project are known by their names, and directories of several may have the same.
        name = about.remembered if goes_on else f"{about.name}-{uuid.uuid4().hex[:6]}"
        assert name is not None
        about.remember(name)
        self._module = importlib.import_module("trackio")
        self._run = self._module.init(
            self.project,
            name=name,
            space_id=self.space_id,
            config=dict(about.config),
            resume="allow" if goes_on else "never",
            embed=False,
            auto_log_gpu=False,  # the run has its own numbers of memory and time
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # What it cannot store it would store as text.
        self._run.log({key: value for key, value in metrics.items() if math.isfinite(value)}, step=step)

    def conclude(self, outcome: Outcome) -> None:
        self.log(outcome.step, outcome.numbers)
        shown: dict[str, Any] = {
            name: self._module.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
            for name, table in outcome.tables.items()
        }
        for name, path in outcome.pictures.items():
            shown[f"report/{name}"] = self._module.Image(str(path))
        if shown:
            self._run.log(shown, step=outcome.step)

    def close(self, failed: bool) -> None:
        self._run.finish()
