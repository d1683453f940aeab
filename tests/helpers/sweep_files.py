"""What a sweep leaves of runs with given gains, for the tables of ``benchmarks.comparison``."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.comparison import gains

BEFORE = {"rare": [0.0, 0.0, 1.0, 0.0], "dense": [40.0, 60.0, 55.0, 45.0]}


def write_answers(file: Path, rows: list[dict[str, float]], gained: dict[str, float]) -> None:
    """Answers whose scores rise by these gains on average, by another part of them each."""
    lines = []
    for index, row in enumerate(rows):
        share = 0.5 + index / (len(rows) - 1)
        after = {name: score + share * gained[name] for name, score in row.items()}
        parts = {
            "before": {"response": "a\u2028b", "scores": row},
            "after": {"response": "r", "scores": after},
        }
        lines.append(json.dumps({"prompt": f"p{index // 2}", **parts}, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def sweep(folder: Path, runs: dict[tuple[str, int], dict[str, float]]) -> Path:
    """What a sweep leaves of runs with these gains."""
    folder.mkdir(parents=True)
    points = []
    for (method, seed), gained in runs.items():
        name = f"{method}-seed{seed}"
        run = folder / "points" / name
        run.mkdir(parents=True)
        rows = [dict(zip(BEFORE, scores, strict=True)) for scores in zip(*BEFORE.values(), strict=True)]
        write_answers(run / gains.ANSWERS, rows, gained)
        audited = {"reward/rare": 0, "reward/dense": 1, "actual_change/sum": -1.0}
        steps = [{**audited, "actual_change/rare": 1.0, "actual_change/dense": x} for x in (-1.0, 0.5, 0.0)]
        log = [audited, *steps] if method != "sum" else [{"reward/rare": 0, "reward/dense": 1}]
        (run / gains.METRICS).write_text("".join(json.dumps(line) + "\n" for line in log))
        facts = {"kl": 0.5, "response_length": 20.0, "state": "finished"}
        told = {"method": method, "preference": None, "settings": {}}
        points.append({"name": name, "seed": seed, **told, **facts})
    points.append({"name": "late-seed1", "seed": 1, "state": "waiting"})
    (folder / "results.json").write_text(json.dumps({"points": points}))
    return folder
