"""Runs above a fake engine that hold their directory as commands do, alone or on several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gapo_mega.config import Config
from gapo_mega.runs import fingerprints
from gapo_mega.runs.identity import Identity, settings_of
from gapo_mega.runs.processes import Alone
from gapo_mega.runs.resume import HELDOUT_ROWS, POLICY, TEMPLATE, TRAINING_ROWS
from gapo_mega.runs.session import Session
from gapo_mega.runs.start import wanted
from tests.helpers.fake_engine import FakeEngine, terminate
from tests.helpers.fake_runs import configuration, trainer
from tests.helpers.team import Group

COMMAND = "gapo-mega train"


def contents(**other: str) -> dict[str, Any]:
    texts = {TRAINING_ROWS: "a", HELDOUT_ROWS: "b", POLICY: "c", TEMPLATE: "d"} | other
    return {key: fingerprints.of_text(text) for key, text in texts.items()}


def hold(config: Config, overwrite: bool) -> Session:
    return Session(config, Path(config.output_dir), wanted(config), overwrite, Alone())


def start(
    directory: Path,
    engine: FakeEngine | None = None,
    found: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
    with_report: bool = False,
    **sections: Any,
) -> tuple[bool, FakeEngine]:
    """What ``run_training`` does, above a fake engine: whether the run finished."""
    config, engine = configuration(directory, **sections), engine or FakeEngine()
    with hold(config, overwrite) as held:
        held.check_settings(Identity(COMMAND, settings_of(config, "critic")))
        updates = config.steps * config.algorithm.minibatches
        held.check_contents(found or contents(), config.steps, updates)
        held.check_export()
        held.begin()
        run = trainer(directory, engine, with_report=with_report, session=held, **sections)
        finished = run.run()
        if finished:
            held.end(run.loop.step)
    return finished, engine


def stopped(directory: Path, after: int = 2, **sections: Any) -> None:
    finished, _ = start(directory, FakeEngine(at={("update_policy", after): terminate}), **sections)
    assert not finished


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def snapshot(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Threads:
    """Ranks as threads of this process."""

    def __init__(self, rank: int, group: Group) -> None:
        self.rank, self.size, self.is_main = rank, group.size, rank == 0
        self._group = group

    def gather(self, value: Any) -> list[Any]:
        return self._group.gather(self.rank, json.loads(json.dumps(value)))

    def leave(self, value: Any, seconds: float) -> list[Any]:
        return self.gather(value)


def on_ranks(count: int, work: Callable[[Threads, int], object]) -> list[object]:
    """What ``work`` gave or raised on every rank."""
    group = Group(list(range(count)))

    def one(rank: int) -> object:
        try:
            return work(Threads(rank, group), rank)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
