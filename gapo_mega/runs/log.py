"""What a run writes at every optimizer step: ``metrics.jsonl``, a progress bar, and what its loggers show.

``metrics.jsonl`` is the record: the report reads it, and tests of resuming compare it. The others are
views of the same dictionary. Only rank 0 writes: on other ranks a ``RunLog`` has no
sinks and does nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from tqdm import tqdm

from gapo_mega.config import LoggingConfig
from gapo_mega.evaluation.files import write_data
from gapo_mega.evaluation.series import METRICS_FILE
from gapo_mega.runs.services import Service, chosen, services


class Sink(Protocol):
    """One place that metrics go to."""

    def restart(self, step: int) -> None:
        """Forget every step after ``step``; called once before the first ``write``."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, failed: bool = False) -> None:
        """``failed``: the run ends with an error."""


class JsonLines:
    """One JSON object per line, on disk before ``write`` returns; values that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def restart(self, step: int) -> None:
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        # A process killed while writing leaves a last line without its newline.
        complete = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in complete if json.loads(line)["step"] <= step]
        write_data(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._file is not None, "restart() comes first"
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Progress:
    """A bar on standard error: rewards, weights, cosines, tokens per second."""

    def __init__(self, names: Sequence[str], total_steps: int) -> None:
        self._names = list(names)
        self._total = total_steps
        self._bar: tqdm[Any] | None = None

    def restart(self, step: int) -> None:
        self.close()
        self._bar = tqdm(total=self._total, initial=step, desc="train", unit="step", dynamic_ncols=True)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._bar is not None, "restart() comes first"
        self._bar.set_postfix_str(progress_text(metrics, self._names), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self, failed: bool = False) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def progress_text(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    """The one-line state that stands beside the progress bar; without objectives, that of supervised runs."""
    if names:
        shown = "reward" if f"reward/{names[0]}" in metrics else "accuracy"  # of preference pairs
        parts = [f"{name} {metrics[f'{shown}/{name}']:.3g}" for name in names]
        weights = [metrics[f"weight/{name}"] for name in names if f"weight/{name}" in metrics]
        if weights:  # none with a scalarizer, but in audited updates
            parts.append("w " + "/".join(f"{weight:.2g}" for weight in weights))
    else:
        parts = [f"loss {metrics['loss']:.4g}"]
    pairs = [f"cosine/{a}/{b}" for a, b in combinations(names, 2)]
    cosines = [metrics[pair] for pair in pairs if pair in metrics]
    if cosines:
        parts.append("cos " + "/".join(f"{value:.2f}" for value in cosines))
    parts.append(f"{metrics['tokens_per_second']:.0f} tok/s")
    if metrics["skipped"]:
        parts.append("SKIPPED")
    return " | ".join(parts)


def check_logging(config: LoggingConfig, packages: bool = True) -> None:
    """Refuse, before any work, loggers that do not exist or lack their package. Raises ``ValueError``.

    ``packages``: whether those have to be here.
    """
    chosen(config, packages)


class RunLog:
    """Every sink that the configuration asks for, behind one ``write`` a step.

    ``total_steps`` counts optimizer steps. With ``enabled`` false (every rank but 0) nothing is
    opened or written. Raises ``ValueError`` for a logger that does not exist or whose package is missing.
    """

    def __init__(
        self,
        directory: Path,
        objective_names: Sequence[str],
        config: LoggingConfig,
        total_steps: int,
        enabled: bool = True,
    ) -> None:
        check_logging(config)
        self._last_step: int | None = None
        self._sinks: list[Sink] = []
        if not enabled:
            return
        self._sinks.append(JsonLines(directory / METRICS_FILE))
        self._sinks += services(config, directory)
        if config.progress:
            self._sinks.append(Progress(objective_names, total_steps))

    def truncate_after(self, step: int) -> None:
        """Drop what an interrupted run wrote after ``step``, the last step in its checkpoint.

        A run resumed from the checkpoint of step j although it had reached k > j then ends with the same
        lines as one that was never interrupted (times and memory aside). 0 starts afresh.
        """
        for sink in self._sinks:
            sink.restart(step)
        self._last_step = step

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record optimizer step ``step`` (from 1). The first call drops what the files hold from there on."""
        if self._last_step is None:
            self.truncate_after(step - 1)
        assert self._last_step is not None and step > self._last_step, (step, self._last_step)
        for sink in self._sinks:
            sink.write(step, metrics)
        self._last_step = step

    def end_steps(self) -> None:
        """Close what takes steps alone: there is none any more. Loggers wait for what comes of the run."""
        for sink in self._sinks:
            if not isinstance(sink, Service):
                sink.close()

    def conclude(self) -> None:
        """Tell the loggers what the run has come to, as its directory has it."""
        for sink in self._sinks:
            if isinstance(sink, Service):
                sink.conclude()

    def close(self, failed: bool = False) -> None:
        """Close every sink; ``failed``: the run ends with an error."""
        for sink in self._sinks:
            sink.close(failed)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)
