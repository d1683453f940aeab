"""The loggers of a run's configuration, kept from ending the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapo_mega.config import LoggingConfig
from gapo_mega.config.core_schema import parse_document
from gapo_mega.credentials import hidden
from gapo_mega.evaluation.files import config_file, write_text
from gapo_mega.runs.directory import LOGGERS_FILE
from gapo_mega.runs.loggers import Logger, build
from gapo_mega.runs.loggers.base import About
from gapo_mega.runs.outcome import SHOWN, read_outcome

logger = logging.getLogger(__name__)

_SECTION = "logging.loggers"


@dataclass(frozen=True)
class Chosen:
    """A logger of the configuration, and how messages speak of it."""

    setting: str
    found: str  # what the setting says
    without: str  # how to do without it
    logger: Logger

    @property
    def label(self) -> str:
        """Its name, or that of the user's own class."""
        return getattr(type(self.logger), "name", type(self.logger).__name__)


def chosen(config: LoggingConfig, packages: bool = True) -> list[Chosen]:
    """Every logger that the configuration asks for, none of them started.

    ``logging.tensorboard`` and ``logging.wandb`` are short for entries without options; an entry of that name
    takes their place. Raises ``ValueError`` for names and options that do not exist, and for missing
    packages, where ``packages`` have to be here.
    """
    listed = [entry.name for entry in config.loggers]
    short: list[tuple[str, bool, dict[str, Any]]] = [
        ("tensorboard", config.tensorboard, {}),
        ("wandb", config.wandb, {"project": config.wandb_project}),
    ]
    found = [
        Chosen(f"logging.{name}", "true", f"set logging.{name}=false", build("logging", name, options))
        for name, wanted, options in short
        if wanted and name not in listed
    ]
    for index, entry in enumerate(config.loggers):
        one = build(f"{_SECTION}.{index}", entry.name, entry.options)
        found.append(Chosen(_SECTION, entry.name, "leave it out", one))
    for each in found if packages else []:
        _check_package(each)
    return found


def _check_package(chosen: Chosen) -> None:
    probe = chosen.logger.probe()
    if probe is not None and not probe.usable:
        raise ValueError(
            f"{chosen.setting}: found {chosen.found}, but {chosen.label} is {probe.found}; run `pip install "
            f"{chosen.label}`, or {chosen.without} (lost: {probe.lost})"
        )


class Service:
    """A sink of a ``RunLog`` that a logger shows. Only ``restart`` raises what the logger raises."""

    def __init__(self, chosen: Chosen, directory: Path) -> None:
        self._chosen = chosen
        self._directory = directory
        self._shown = SHOWN
        self._step = 0
        self._open = False

    def restart(self, step: int) -> None:
        """Start the logger. Raises ``ValueError``, in one line, whatever is wrong with it."""
        self.close()
        self._step = step
        about = self._about(step)
        evaluation = about.config.get("evaluation")
        if isinstance(evaluation, Mapping):
            self._shown = int(evaluation.get("shown", SHOWN))
        try:
            self._chosen.logger.start(about)
        except Exception as error:
            raise ValueError(
                f"{self._chosen.setting}: found {self._chosen.found}, but {self._chosen.label} did not start "
                f"({_in_one_line(error)}); accepted: one that does, or {self._chosen.without}"
            ) from error
        self._open = True

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._guarded(lambda: self._chosen.logger.log(step, metrics), f"step {step}")

    def conclude(self) -> None:
        """Tell the logger what the run has come to."""
        found = read_outcome(self._directory, self._step, self._shown)
        self._guarded(lambda: self._chosen.logger.conclude(found), "the end of the run")

    def close(self, failed: bool = False) -> None:
        self._guarded(lambda: self._chosen.logger.close(failed), "the end of the run")
        self._open = False

    def _guarded(self, call: Callable[[], None], when: str) -> None:
        """Call a logger that is open; after an error, which is told, it is not."""
        if not self._open:
            return
        try:
            call()
        except Exception as error:
            self._open = False
            logger.warning(
                "%s: %s failed at %s and is left out from here on (%s); metrics.jsonl has every step",
                self._chosen.setting,
                self._chosen.label,
                when,
                _in_one_line(error),
            )

    def _about(self, step: int) -> About:
        path = config_file(self._directory)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._directory.mkdir(parents=True, exist_ok=True)
        memory = _memory(self._directory)
        return About(
            directory=self._directory,
            config=parse_document(text) if text else {},
            config_text=text,
            step=step,
            remembered=memory.get(self._chosen.found) if step else None,
            remember=self._remember,
        )

    def _remember(self, text: str) -> None:
        memory = {**_memory(self._directory), self._chosen.found: text}
        write_text(self._directory / LOGGERS_FILE, json.dumps(memory, indent=1) + "\n")


def services(config: LoggingConfig, directory: Path) -> Iterator[Service]:
    """The sinks of all loggers of a configuration. Raises ``ValueError`` as ``chosen`` does."""
    for each in chosen(config):
        yield Service(each, directory)


def _memory(directory: Path) -> dict[str, str]:
    path = directory / LOGGERS_FILE
    if not path.is_file():
        return {}
    try:
        return {str(name): str(text) for name, text in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError):
        logger.warning("%s is not as a run writes it: loggers begin new runs", path)
        return {}


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {hidden(' '.join(str(error).split()))[:300]}"
