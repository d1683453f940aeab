"""TensorBoard: event files in the run's directory."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gapo_mega import optional
from gapo_mega.optional import Probe
from gapo_mega.runs.directory import TENSORBOARD_FOLDER
from gapo_mega.runs.loggers.base import About, Logger, Outcome


@dataclass(kw_only=True)
class TensorBoard(Logger):
    """Event files under ``tensorboard/``; after a restart readers drop the steps that are repeated."""

    name: ClassVar[str] = "tensorboard"

    _writer: Any = field(default=None, init=False, repr=False)

    @classmethod
    def probe(cls) -> Probe:
        return optional.tensorboard()

    def start(self, about: About) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        folder = about.directory / TENSORBOARD_FOLDER
        self._writer = module.SummaryWriter(log_dir=str(folder), purge_step=about.step + 1)
        if about.config_text and not about.step:
            indented = "\n".join(f"    {line}" for line in about.config_text.splitlines())
            self._writer.add_text("configuration", indented, 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def conclude(self, outcome: Outcome) -> None:
        from matplotlib import image

        for key, value in outcome.numbers.items():
            self._writer.add_scalar(key, value, outcome.step)
        for name, table in outcome.tables.items():
            self._writer.add_text(name, table.as_markdown(), outcome.step)
        for name, path in outcome.pictures.items():
            self._writer.add_image(f"report/{name}", image.imread(path), outcome.step, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()
