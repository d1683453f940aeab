"""The ``gapo-mega`` command: assembles the commands of ``gapo_mega/commands``.

A new command is one new file there, and its import and its line here. Command files import heavy modules
inside their functions, so that ``--help`` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from gapo_mega.commands import benchmark
from gapo_mega.commands.audit import audit
from gapo_mega.commands.chat import chat
from gapo_mega.commands.compare import compare
from gapo_mega.commands.convert import convert
from gapo_mega.commands.evaluate import evaluate
from gapo_mega.commands.info import info, installed
from gapo_mega.commands.plan import plan
from gapo_mega.commands.serve_reward import serve_reward
from gapo_mega.commands.sft import sft
from gapo_mega.commands.soup import soup
from gapo_mega.commands.sweep import sweep
from gapo_mega.commands.train import train
from gapo_mega.commands.train_pairs import train_pairs
from gapo_mega.commands.train_reward import train_reward
from gapo_mega.rollout.servers.lost import SERVER_LOST, ServerLost
from gapo_mega.runs.error_output import show_error, show_traceback
from gapo_mega.runs.exits import noted
from gapo_mega.whereabouts import PEERS_LOST, LostPeersError

USER_ERROR = 2  # exit code, as for a wrong command line
TRACEBACK = "GAPO_MEGA_TRACEBACK"

app = typer.Typer(
    name="gapo-mega",
    help="Gradient-Adaptive Policy Optimization of language models on Megatron-core.",
    epilog=f"Errors in what was asked for are one line; set {TRACEBACK}=1 to see where they were raised.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # brackets in a help text, as of defaults, are no markup
    pretty_exceptions_enable=False,
)

# In the order of --help.
app.command()(train)
app.command()(train_pairs)
app.command()(train_reward)
app.command()(sft)
app.command()(sweep)
app.command()(compare)
app.command()(evaluate)
app.command()(chat)
app.command()(plan)
app.command()(convert)
app.command()(soup)
app.command()(audit)
app.command()(serve_reward)
app.command()(info)
app.add_typer(benchmark.app, name="benchmark")


def main() -> None:
    """Entry point of the command and of ``python -m gapo_mega.cli``."""
    try:
        with noted():
            _main()
    finally:
        sys.excepthook = show_traceback  # after typer, which sets its own


def _main() -> None:
    try:
        app()
    except (ValueError, LostPeersError, ServerLost, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:  # a name that a user has given
            raise
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            raise
        show_error(error)
        sys.exit(_exit_code(error))


def _exit_code(error: Exception) -> int:
    if isinstance(error, LostPeersError):
        return PEERS_LOST
    return SERVER_LOST if isinstance(error, ServerLost) else USER_ERROR


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gapo-mega {installed('gapo-mega')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command's name."""


if __name__ == "__main__":
    main()
