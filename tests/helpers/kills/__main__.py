"""``python -m tests.helpers.kills``: so many kills, and their table."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tests.helpers.kills import table
from tests.helpers.kills.cases import LAYOUTS, STARTS
from tests.helpers.kills.session import RESULTS, Session, read


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 1 where something was lost or ends as it should not, 2 if refused."""
    try:
        return _main(_arguments(words))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    if arguments.table is not None:
        found = [case for path in arguments.found for case in read(path)]
        table.write(arguments.table, found)
        print(table.text(found))
        return 0
    signal.signal(signal.SIGTERM, _leave)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.out or Path(temporary)).absolute()
        session = Session(
            folder,
            arguments.seed,
            arguments.layouts,
            arguments.start,
            workers=arguments.workers,
            again=arguments.again,
        )
        session.run(arguments.kills)
    print(table.text(session.found))
    for case in session.failed:
        print(f"\ncase {case['case']}: {table.told(case)}", *case["faults"], sep="\n  ")
    return 1 if session.failed else 0


def _leave(number: int, frame: FrameType | None) -> None:
    """Here and in what it forks: nothing stays."""
    sys.exit(128 + number)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.helpers.kills",
        description="Training runs of three steps are killed at random places, started again, and compared "
        "bit for bit with undisturbed ones.",
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="so many in all (200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"keeps what was done, in {RESULTS}; it is not done again"
    )
    parser.add_argument(
        "--layouts", default=",".join(LAYOUTS), help="alone: without torchrun; else of --nproc"
    )
    parser.add_argument(
        "--start",
        default="both",
        choices=[*STARTS, "both"],
        help="command: each as a user gives it; forked: without loading Python anew; both: every tenth as a "
        "command (both)",
    )
    parser.add_argument(
        "--again", type=float, default=0.25, metavar="SHARE", help="of runs that are disturbed twice (0.25)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="K", help="cases side by side (1)")
    parser.add_argument(
        "--table", type=Path, metavar="PATH", help="only write PATH.md and PATH.json from the files named"
    )
    parser.add_argument("found", type=Path, nargs="*", metavar="FILE.jsonl")
    arguments = parser.parse_args(words)
    arguments.layouts = tuple(arguments.layouts.split(","))
    if not set(arguments.layouts) <= set(LAYOUTS):
        parser.error(f"--layouts: found {','.join(arguments.layouts)}, accepted: some of {','.join(LAYOUTS)}")
    if bool(arguments.found) != (arguments.table is not None):
        parser.error("--table goes with the files that it is made of")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
