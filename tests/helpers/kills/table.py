"""What came of kills, as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.kills.phases import PHASES
from tests.helpers.kills.state import of_cases

Found = dict[str, Any]


def kills_of(found: Iterable[Found]) -> list[tuple[Found, Found]]:
    """Every kill that hit, with its case."""
    return [(kill, case) for case in found for kill in case["kills"] if kill["hit"] is not None]


def told(case: Found) -> str:
    """A case in words."""
    kills = [f"{kill['signal']} to {kill['target']} in {kill['phase']}" for kill in case["kills"]]
    return f"layout {case['layout']}, started as {case['start']}: {', then '.join(kills)}"


def text(found: Sequence[Found]) -> str:
    """Markdown: phase and signal, phase and who was hit, layout and signal."""
    kills = kills_of(found)
    signals = sorted({kill["signal"] for kill, _ in kills}, key=_order)
    phases = [phase.name for phase in PHASES]
    equal = sum(case["equal"] for _, case in kills)
    resumed = sum(case["resumed"] for _, case in kills)
    commands = sum(case["start"] == "command" for case in found)
    lines = [
        f"{len(kills)} kills in {len(found)} runs; resumed after {resumed}, equal in the end after {equal}.",
        f"Seeds: {', '.join(str(seed) for seed in sorted({case['seed'] for case in found}))}. "
        f"Started as commands: {commands} runs, the others as forks.",
        f"State of the code: {', '.join(of_cases(found))}.",
        "",
        "Each cell: kills / resumed / equal to the undisturbed run.",
        "",
        *_table("phase", kills, phases, lambda kill, case: kill["hit"]["phase"], signals, _signal),
        "",
        *_table(
            "who is hit", kills, _seen(kills, "target"), lambda kill, case: kill["target"], signals, _signal
        ),
        "",
        *_table("layout", kills, _layouts(kills), lambda kill, case: case["layout"], signals, _signal),
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, found: Sequence[Found]) -> None:
    """``PATH.md`` and ``PATH.json``. Raises ``ValueError`` for cases of different code."""
    states = of_cases(found)
    if len(states) > 1:
        raise ValueError(f"--table: found cases of the code {', '.join(states)}, accepted: of one state")
    path.with_suffix(".md").write_text("# Random kills\n\n" + text(found), encoding="utf-8")
    lines = ",\n".join(map(json.dumps, found))  # one a case
    path.with_suffix(".json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _signal(kill: Found, case: Found) -> str:
    name: str = kill["signal"]
    return name


def _order(signal: str) -> tuple[int, str]:
    return ("twice" in signal, signal)


def _seen(kills: Sequence[tuple[Found, Found]], key: str) -> list[str]:
    return sorted({kill[key] for kill, _ in kills})


def _layouts(kills: Sequence[tuple[Found, Found]]) -> list[str]:
    return sorted({case["layout"] for _, case in kills})


def _table(
    title: str,
    kills: Sequence[tuple[Found, Found]],
    rows: Sequence[str],
    row_of: Callable[[Found, Found], str],
    columns: Sequence[str],
    column_of: Callable[[Found, Found], str],
) -> list[str]:
    lines = [f"| {title} | {' | '.join(columns)} | all |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        mine = [(kill, case) for kill, case in kills if row_of(kill, case) == row]
        cells = [_cell([(k, c) for k, c in mine if column_of(k, c) == column]) for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} | {_cell(mine)} |")
    return lines


def _cell(kills: Sequence[tuple[Found, Found]]) -> str:
    if not kills:
        return ""
    return " / ".join(
        str(number)
        for number in (
            len(kills),
            sum(case["resumed"] for _, case in kills),
            sum(case["equal"] for _, case in kills),
        )
    )
