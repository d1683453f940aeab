"""Step time with rollouts drawn ahead, against the slower of rollout and training, and against their sum.

    python -m benchmarks.rollouts_ahead --out benchmarks/results/DATE-rollouts-ahead-cpu.json

The rollouts are those of the tests' small server, which speaks vLLM's protocol over a socket and sleeps a
while at every token; the training is a loop whose update sleeps. So the times are what the two would take on
machines of their own, whatever else this one does, and what is measured is how they overlap. The server
answers any number of requests at once. In the setting ``uneven`` every second rollout takes three times as
long as the others.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gapo_mega.engine.base import GradientReport
from gapo_mega.rollout.backends.vllm import Vllm
from tests.helpers.fake_engine import END
from tests.helpers.fake_runs import trainer
from tests.helpers.metrics_log import metrics
from tests.helpers.table_policy import TablePolicy
from tests.helpers.vllm_protocol import TableServer, table_server

TOKENS = 10  # of a response
ROWS = 8  # of a step
SETTINGS = {  # length of the rollouts of even and of odd steps, as multiples of the training's
    "faster": (0.5, 0.5),
    "equal": (1.0, 1.0),
    "slower": (2.0, 2.0),
    "uneven": (0.5, 1.5),
}
NAMES = ("staleness", "waited", "seconds", "overlap", "weights")
AHEAD = (0, 1, 2)


class Sleeping(TablePolicy):
    """An update takes ``seconds``. No response ends before its last token."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self.table[:, END] = -1e4

    def update_policy(self, *arguments: Any, **options: Any) -> GradientReport:
        time.sleep(self._seconds)
        return super().update_policy(*arguments, **options)


def measure(server: TableServer, rollouts: tuple[float, float], train: float, ahead: int, steps: int) -> Any:
    """Means over the steps but the first two and the last, at which nothing is under way."""
    begun = server.generated

    def sleep(path: str, content: Any) -> None:
        if "generate" in path:
            step = (server.generated - begun) // ROWS
            time.sleep(rollouts[step % 2])

    server.fail = sleep  # type: ignore[assignment]
    vllm = {"url": server.url, "patience": 0, "start_timeout": 5}
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(
            Path(folder),
            Sleeping(train),
            held_out=[],
            steps=steps,
            rollout={"backend": "vllm", "ahead": ahead, "vllm": vllm, "max_new_tokens": TOKENS},
            backend=Vllm,
        )
        started = time.perf_counter()
        run.run()
        whole = time.perf_counter() - started
        lines = metrics(Path(folder), ())[2:-1]
    found = {"step": statistics.mean(line["time/step"] for line in lines), "whole": whole / steps}
    if ahead:
        found |= {name: statistics.mean(line[f"rollout/{name}"] for line in lines) for name in NAMES}
    return found


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    train: Annotated[float, typer.Option(help="Seconds of an update.")] = 0.5,
    steps: Annotated[int, typer.Option(min=6, help="Steps of each run.")] = 12,
) -> None:
    """Measure all settings, and print a table."""
    found: list[dict[str, Any]] = []
    with table_server() as server:
        for name, multiples in SETTINGS.items():
            rollouts = multiples[0] * train, multiples[1] * train
            for ahead in AHEAD:
                own = measure(server, rollouts, train, ahead, steps)
                found.append({"setting": name, "rollouts": rollouts, "train": train, "ahead": ahead, **own})
    print("| rollout s | train s | ahead | step s | of the slower | of the sum | overlap | staleness |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        first, second = row["rollouts"]
        mean, step = (first + second) / 2, row["step"]
        ratios = f"{step / max(mean, train):.2f} | {step / (mean + train):.2f}"
        told = f"{row.get('overlap', 0):.2f} | {row.get('staleness', 0):.1f}"
        print(f"| {first:g}, {second:g} | {train:g} | {row['ahead']} | {step:.2f} | {ratios} | {told} |")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
