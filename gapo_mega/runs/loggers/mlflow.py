"""MLflow: a folder, a database or a server."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gapo_mega import optional
from gapo_mega.optional import Probe
from gapo_mega.runs.loggers.base import About, Logger, Outcome, require_text

_PARAMETERS_AT_ONCE, _METRICS_AT_ONCE = 100, 1000  # MLflow's limits
_LONGEST_VALUE = 500  # of a parameter that every store takes
# A server that has gone would otherwise hold up a step for many minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


@dataclass(kw_only=True)
class Mlflow(Logger):
    """A run of an experiment, which a resumed process goes on with.

    Without ``tracking_uri`` the place is MLflow's own choice (``MLFLOW_TRACKING_URI``). Steps repeated after
    a kill stay there twice; ``metrics.jsonl`` has them once.
    """

    name: ClassVar[str] = "mlflow"

    experiment: str = "gapo_mega"
    tracking_uri: str | None = None
    _client: Any = field(default=None, init=False, repr=False)
    _run: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        require_text("experiment", self.experiment)
        require_text("tracking_uri", self.tracking_uri, none=True)

    @classmethod
    def probe(cls) -> Probe:
        return optional.mlflow()

    def start(self, about: About) -> None:
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        self._client = importlib.import_module("mlflow").MlflowClient(self.tracking_uri)
        if about.step and about.remembered is not None:
            self._run = about.remembered
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        place = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        self._run = self._client.create_run(place, run_name=about.name).info.run_id
        about.remember(self._run)
        entities = importlib.import_module("mlflow.entities")
        parameters = [
            entities.Param(key, str(value)[:_LONGEST_VALUE]) for key, value in _flat(about.config).items()
        ]
        for part in _parts(parameters, _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run, params=part)
        if about.config_text:
            self._client.log_text(self._run, about.config_text, "config.yaml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        entities = importlib.import_module("mlflow.entities")
        now = int(time.time() * 1000)
        found = [entities.Metric(key, float(value), now, step) for key, value in metrics.items()]
        for part in _parts(found, _METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=part)

    def conclude(self, outcome: Outcome) -> None:
        self.log(outcome.step, outcome.numbers)
        for name, table in outcome.tables.items():
            columns = zip(table.columns, zip(*table.rows, strict=True), strict=True)
            data = {column: list(values) for column, values in columns}
            self._client.log_table(self._run, data, f"{name}.json")
        for path in outcome.pictures.values():
            self._client.log_artifact(self._run, str(path), "report")
        if outcome.page is not None:
            self._client.log_artifact(self._run, str(outcome.page), "report")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """The settings by their dotted names; lists of mappings are taken apart, others are values."""
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, object] = {}
    for key, inner in items:
        found |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return found


def _parts(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])
