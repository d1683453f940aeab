"""A long training keeps nothing of its steps: memory, objects and open files stay what they are."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from gapo_mega.engine.base import Aggregator, GradientReport, PolicyLossSum
from gapo_mega.types import Experience
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_runs import trainer

PROCESS = Path("/proc/self")
STEPS, WARM, EVERY = 400, 120, 40
# 115 kB were seen from the first look to the last. A kept rollout takes 3 kB a step only, but 11 objects.
MOST_BYTES = 2 << 20


class Watching(FakeEngine):
    """Notes now and then how many objects, open files and bytes of memory this process has."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        self.seen: dict[int, tuple[int, int, int]] = {}

    def update_policy(
        self, minibatch: Experience, loss: PolicyLossSum, aggregator: Aggregator, *, audit: bool = False
    ) -> GradientReport:
        report = super().update_policy(minibatch, loss, aggregator, audit=audit)
        self.updates += 1
        self.calls.clear()  # its own record
        self.prompts.clear()
        if self.updates % EVERY == 0:
            gc.collect()
            # Not of files: the system takes and reads their pages as it likes.
            resident, of_files = map(int, (PROCESS / "statm").read_text().split()[1:3])
            memory = (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
            self.seen[self.updates] = (len(gc.get_objects()), len(os.listdir(PROCESS / "fd")), memory)
        return report


@pytest.mark.skipif(not PROCESS.is_dir(), reason="only Linux tells what a process has open")
def test_hundreds_of_steps_leave_nothing_behind(tmp_path: Path) -> None:
    engine = Watching()
    run = trainer(
        tmp_path / "run",
        engine,
        steps=STEPS,
        evaluation={"every_steps": 100},
        checkpoint={"every_steps": 50, "best": "long"},
        logging={"responses": 2},
    )
    assert run.run()
    objects, files, memory = zip(*(engine.seen[step] for step in range(WARM, STEPS + 1, EVERY)), strict=True)
    assert len(set(files)) == 1, files
    assert objects[-1] - objects[0] < STEPS - WARM, objects  # less than one a step
    assert memory[-1] - memory[0] < MOST_BYTES, memory
