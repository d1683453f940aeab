"""What a sweep says: a table of what was met, and how to run again what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tests.helpers.combinations.comparison import CHECKS, tolerances
from tests.helpers.combinations.running import Outcome
from tests.helpers.combinations.settings import AXES, Setting


def command(setting: Setting) -> str:
    """The command that runs one combination."""
    return "python -m tests.helpers.combinations " + " ".join(
        f"--where {k}={v}" for k, v in setting.values.items()
    )


def failure(outcome: Outcome) -> str:
    """What is wrong, and how to see it again."""
    if outcome.error is not None:
        reason = outcome.error.strip()
    else:
        allowed = tolerances(outcome.setting)[outcome.check]
        reason = f"{outcome.check}: error {outcome.errors[outcome.check]:.3g}, accepted {allowed:.3g}"
    return f"FAILED {command(outcome.setting)}\n{reason}"


def table(outcomes: Sequence[Outcome]) -> str:
    """By value of every axis: combinations run, failed, and the worst error over its tolerance."""
    return "\n".join([*_by_value(outcomes), "", *_by_check(outcomes)])


def refusals(refused: Counter[str]) -> str:
    """Combinations that the project does not accept, by what it says of them."""
    reasons: Counter[str] = Counter()
    for message, count in refused.items():
        reasons[message.split(", accepted")[0]] += count
    return "\n".join(f"{count:7,} {reason}" for reason, count in reasons.most_common())


def _by_value(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"{'axis':20} {'value':12} {'run':>6} {'failed':>6} {'worst / tolerance':>18}"
    for axis, values in AXES.items():
        for value in values:
            met = [outcome for outcome in outcomes if outcome.setting.values[axis] == value]
            failed = sum(outcome.failed for outcome in met)
            worst = f"{max(outcome.worst for outcome in met):.3g}" if met else ""
            yield f"{axis:20} {value:12} {len(met):6,} {failed:6,} {worst:>18}"


def _kind(setting: Setting) -> str:
    """What the tolerances differ by."""
    if setting.dtype == "bf16":
        return "bf16"
    return "fp32, bf16 rows" if setting.store_dtype == "bf16" else "fp32"


def _by_check(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"{'check':20} {'numbers':18} {'run':>6} {'worst error':>12} {'accepted':>10}"
    for check in CHECKS:
        for kind in ("fp32", "fp32, bf16 rows", "bf16"):
            met = [o for o in outcomes if check in o.errors and _kind(o.setting) == kind]
            if met:
                worst = max(outcome.errors[check] for outcome in met)
                allowed = tolerances(met[0].setting)[check]
                yield f"{check:20} {kind:18} {len(met):6,} {worst:12.2e} {allowed:10.1e}"
