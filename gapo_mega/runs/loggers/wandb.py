"""Weights & Biases."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gapo_mega import optional
from gapo_mega.evaluation.files import write_text
from gapo_mega.optional import Probe
from gapo_mega.runs.directory import WANDB_ID
from gapo_mega.runs.loggers.base import About, Logger, Outcome, require_text


@dataclass(kw_only=True)
class Wandb(Logger):
    """A run that a resumed process joins again: its id is kept in the run directory.

    Steps repeated after a kill stay there twice; ``metrics.jsonl`` has them once. Everything else is said by
    wandb's own environment variables, such as ``WANDB_MODE=offline``.
    """

    name: ClassVar[str] = "wandb"

    project: str = "gapo_mega"
    entity: str | None = None
    group: str | None = None
    _module: Any = field(default=None, init=False, repr=False)
    _run: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require_text("project", self.project)
        require_text("entity", self.entity, none=True)
        require_text("group", self.group, none=True)

    @classmethod
    def probe(cls) -> Probe:
        return optional.wandb()

    def start(self, about: About) -> None:
        id_file = about.directory / WANDB_ID
        if about.step == 0 or not id_file.exists():
            write_text(id_file, uuid.uuid4().hex)
        self._module = importlib.import_module("wandb")
        self._run = self._module.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=about.name,
            dir=str(about.directory),
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
        )
        self._run.config.update(dict(about.config), allow_val_change=True)  # of a resumed run, too
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def conclude(self, outcome: Outcome) -> None:
        shown: dict[str, Any] = {
            name: self._module.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
            for name, table in outcome.tables.items()
        }
        for name, path in outcome.pictures.items():
            shown[f"report/{name}"] = self._module.Image(str(path))
        if outcome.page is not None:
            shown["report/page"] = self._module.Html(str(outcome.page), inject=False)
        self._run.log({"step": outcome.step, **shown})
        self._run.summary.update(dict(outcome.numbers))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
