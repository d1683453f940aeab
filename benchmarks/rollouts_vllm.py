"""What runs with vLLM say of mismatch, weights and time, from their logs.

    python -m benchmarks.rollouts_vllm runs/demo-vllm runs/demo-vllm-ahead \\
      --out benchmarks/results/DATE-rollouts-vllm-cpu.json

docs/rollouts.md has the commands of the runs. ``mean`` leaves out the first step, at which the server is
warming up.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from gapo_mega.config.loading import load

_GROUPS = ("time/", "rollout/", "weights/", "logprob_difference/", "correction/", "reward/")
_COLUMNS = (
    *("time/step", "time/rollout", "rollout/waited", "rollout/overlap", "weights/seconds"),
    *("logprob_difference/mean", "logprob_difference/max", "logprob_difference/outside", "correction/held"),
)


def figures(run: Path) -> dict[str, Any]:
    """Settings, every step, means over the steps but the first, and held-out rewards of a run.

    Raises ``ValueError`` where a run has less than two steps or is not at its end.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = run / "summary.json"
    if len(lines) < 2 or not summary.is_file():
        raise ValueError(f"{run}: found {len(lines)} steps, accepted: a run of two steps or more at its end")
    steps = [{k: v for k, v in line.items() if k == "step" or k.startswith(_GROUPS)} for line in lines]
    config = load(run / "config.yaml")
    mean = {
        name: statistics.mean(values)
        for name in steps[-1]
        if name != "step" and (values := [line[name] for line in steps[1:] if name in line])
    }
    return {
        "run": run.name,
        "backend": config.rollout.backend,
        "ahead": config.rollout.ahead,
        "dtype": config.model.dtype,
        "correction": config.algorithm.correction,
        "mean": mean,
        "objectives": json.loads(summary.read_text())["objectives"],
        "steps": steps,
    }


def main(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Print a table of means, and of held-out rewards."""
    found = [figures(run) for run in runs]
    print("| run | " + " | ".join(_COLUMNS) + " |")
    print("|---" * (len(_COLUMNS) + 1) + "|")
    for run in found:
        cells = (f"{run['mean'][name]:.3g}" if name in run["mean"] else "" for name in _COLUMNS)
        print(f"| {run['run']} | {' | '.join(cells)} |")
    for run in found:
        for name, held in run["objectives"].items():
            print(f"{run['run']}, {name}: {held['before']:.3f} -> {held['after']:.3f}")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
