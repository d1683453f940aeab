"""A comparison of runs as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

_NONE = "–"


def markdown(found: Mapping[str, Any]) -> str:
    """Three tables of what ``compare`` gives: groups, tests, and cost."""
    names = found["objectives"]
    parts = [
        "Held-out means after training and gains, over seeds, with their standard errors. They are "
        "of the policy after `of step` rollout steps.\n",
        _table(
            ["method", "seeds", *names, *(f"gain of {name}" for name in names), "KL", "length", "of step"],
            [
                [
                    group["label"],
                    str(len(group["seeds"])),
                    *(_with_error(group["after"][name]) for name in names),
                    *(_with_error(group["gain"][name], sign=True) for name in names),
                    _with_error(group["kl"]),
                    _with_error(group["response_length"]),
                    _range(group["of_steps"]),
                ]
                for group in found["groups"]
            ],
        ),
        "Cost of a run, mean over seeds.\n",
        _table(
            ["method", "samples", "backwards", "updates", "seconds"],
            [
                [
                    group["label"],
                    *(_plain(group[key]) for key in ("samples", "backwards", "updates", "seconds")),
                ]
                for group in found["groups"]
            ],
        ),
    ]
    if found["tests"]:
        parts += [
            f"Differences from {found['baseline']}: paired t tests over common seeds, and over common "
            "held-out prompts. p values are not corrected for their number.\n",
            _table(
                ["method", "objective", "over seeds", "n", "p", "over prompts", "n", "p"],
                [
                    [
                        test["group"],
                        test["objective"],
                        *_tested(test["over_seeds"]),
                        *_tested(test["over_prompts"]),
                    ]
                    for test in found["tests"]
                ],
            ),
        ]
    return "\n".join(parts)


def as_csv(found: Mapping[str, Any]) -> str:
    """A line for every group: each number and its standard error over seeds."""
    rows = []
    for group in found["groups"]:
        row: dict[str, Any] = {
            "label": group["label"],
            "method": group["method"],
            "seeds": " ".join(map(str, group["seeds"])),
            "of_steps": " ".join(map(str, group["of_steps"])),
        }
        for measure in ("after", "gain"):
            for name, value in group[measure].items():
                row |= _columns(f"{measure}/{name}", value)
        for key in ("kl", "response_length", "samples", "backwards", "updates", "seconds"):
            row |= _columns(key, group[key])
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _columns(key: str, value: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: value["mean"], f"{key}/standard_error": value["standard_error"]}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _with_error(value: Mapping[str, float | None], *, sign: bool = False) -> str:
    mean, error = value["mean"], value["standard_error"]
    if mean is None:
        return _NONE
    shown = f"{mean:+.4g}" if sign else f"{mean:.4g}"
    return shown if error is None else f"{shown} ± {error:.2g}"


def _range(steps: Sequence[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _plain(value: Mapping[str, float | None]) -> str:
    mean = value["mean"]
    return _NONE if mean is None else f"{mean:,.0f}"


def _tested(test: Mapping[str, Any] | None) -> list[str]:
    if test is None or test["difference"] is None:
        return [_NONE] * 3
    interval = test["interval"]
    within = "" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]"
    p = _NONE if test["p"] is None else f"{test['p']:.2g}"
    return [f"{test['difference']:+.3g}{within}", str(test["n"]), p]
