"""``python -m tests.helpers.combinations``: a sweep, for as long as asked for."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tests.helpers.combinations import reporting
from tests.helpers.combinations.covering import covering_order
from tests.helpers.combinations.reference import shapes_of, write_models
from tests.helpers.combinations.running import Outcome, Sweep, read, write
from tests.helpers.combinations.settings import AXES, LAYOUTS, Setting, combinations, parse_where


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 1 where a combination disagrees or does not run."""
    arguments = _arguments(words)
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_models(models)
        order = _order(arguments, models)
        before = _before(arguments.out, order)
        outcomes = _run(arguments, models, order, before)
    print(reporting.table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.failed]
    print(f"\n{len(outcomes):,} of {len(order):,} combinations run, {len(failed):,} failed")
    for outcome in failed:
        print(f"\n{reporting.failure(outcome)}")
    if not outcomes:
        print("nothing was run", file=sys.stderr)
    return 1 if failed or not outcomes else 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.helpers.combinations",
        description="Two steps with every valid combination of gradient settings, compared with transformers "
        "and autograd in float64. Every pair and triple of settings is met early.",
        epilog="axes: " + "; ".join(f"{axis}: {', '.join(values)}" for axis, values in AXES.items()),
    )
    parser.add_argument("--limit-minutes", type=float, default=float("inf"), metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--ranks", default="1,2,4", help="layouts of these numbers of ranks (1,2,4)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 4), metavar="K")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="what was run; it is not run again")
    parser.add_argument("--where", action="append", default=[], metavar="AXIS=VALUE")
    arguments = parser.parse_args(words)
    try:
        arguments.where = parse_where(arguments.where)
        arguments.ranks = _ranks(arguments.ranks)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _ranks(text: str) -> set[int]:
    known = {layout.ranks for layout in LAYOUTS.values()}
    found = text.split(",")
    if not set(found) <= {str(ranks) for ranks in known}:
        raise ValueError(f"--ranks: found {text}, accepted: some of {','.join(map(str, sorted(known)))}")
    return {int(part) for part in found}


def _order(arguments: argparse.Namespace, models: Path) -> list[Setting]:
    """The valid combinations asked for, in the order in which they run."""
    found = combinations(shapes_of(models), arguments.where)
    print(f"{found.total:,} combinations, {len(found.valid):,} valid; refused:")
    print(reporting.refusals(found.refused))
    wanted = [setting for setting in found.valid if LAYOUTS[setting.layout].ranks in arguments.ranks]
    order, covering = covering_order([tuple(setting.values.values()) for setting in wanted], arguments.seed)
    print(f"{len(order):,} to run; the first {covering:,} meet every triple of values", flush=True)
    return [wanted[index] for index in order]


def _before(out: Path | None, order: list[Setting]) -> list[Outcome]:
    """What the file has of these combinations."""
    wanted = set(order)
    return [] if out is None else [outcome for outcome in read(out) if outcome.setting in wanted]


def _run(
    arguments: argparse.Namespace, models: Path, order: list[Setting], before: list[Outcome]
) -> list[Outcome]:
    outcomes = list(before)
    done = {outcome.setting for outcome in before}
    with tqdm(total=len(order), initial=len(done), unit="combination", smoothing=0.02) as bar:

        def take(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if arguments.out is not None:
                write(arguments.out, outcome)
            if outcome.failed:
                bar.write(reporting.failure(outcome).splitlines()[0], file=sys.stderr)
            bar.update()
            bar.set_postfix(failed=sum(o.failed for o in outcomes), refresh=False)

        sweep = Sweep(models, take, arguments.limit_minutes * 60)
        sweep.run([setting for setting in order if setting not in done], arguments.workers)
    return outcomes


if __name__ == "__main__":
    begin = time.monotonic()
    status = main()
    print(f"{time.monotonic() - begin:.0f} s")
    sys.exit(status)
