"""Commands without the seconds that an interpreter takes to load: this process loads all, and forks.

A fork becomes ``gapo-mega ...``. Where the command becomes torchrun, or torchrun starts a rank, what would be
a new interpreter is another fork: those of ranks are made first, before any thread is there, and wait for
what torchrun gives them. Processes, sessions, signals and exit codes are those of the commands.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What a run imports on its way, so that its forks need not.
_LOADED = (
    "gapo_mega.cli",
    "gapo_mega.runs.start",
    "gapo_mega.runs.evaluate",
    "gapo_mega.runs.pairs",
    "gapo_mega.runs.supervised",
    "gapo_mega.runs.local_torchrun",
    "gapo_mega.engine.megatron.engine",
    "gapo_mega.commands.plan",
    "gapo_mega.evaluation.audit_plot",
    "gapo_mega.evaluation.plots",
    "matplotlib.backends.backend_agg",
    "mpl_toolkits.mplot3d",
    "torch.distributed.run",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "transformers.models.llama.modeling_llama",
)


def load() -> None:
    """Import what runs need. Raises ``RuntimeError`` where that starts threads: forks would lack them."""
    for module in _LOADED:
        importlib.import_module(module)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import has started a thread: OMP_NUM_THREADS=1 keeps libraries from that")


@dataclass(frozen=True)
class Order:
    """A command to start.

    Attributes:
        arguments: of ``gapo-mega``.
        environment: all variables of its process.
        folder: where it works.
        output, errors: files that standard output and standard error are appended to.
        ranks: processes that it may start; 0: it starts none.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    output: str
    errors: str
    ranks: int


def start(order: Order, begin: Callable[[], object] = lambda: None) -> int:
    """Start the command; the number of its process. ``begin``: what it and each of its ranks call first."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _alone(lambda: _command(order, begin))
    return process


def in_fork(work: Callable[[], object]) -> int:
    """``work`` in a process of its own, whose exit code is 0 if it returns."""
    process = os.fork()
    if process == 0:
        _alone(work)
    return process


def _alone(work: Callable[[], object]) -> NoReturn:
    """Run ``work`` as the main program of this process, which ends as an interpreter ends."""
    code = 1
    try:
        code = _exit_code(work)
    finally:
        os._exit(code)


def _exit_code(work: Callable[[], object]) -> int:
    atexit._clear()
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _command(order: Order, begin: Callable[[], object]) -> None:
    from gapo_mega.cli import main

    os.setsid()
    _redirect(order)
    os.chdir(order.folder)
    sys.path[0] = order.folder  # as `python -m` has it
    _fresh(order.environment)
    waiting: list[_Waiting] = []
    for _ in range(order.ranks):
        waiting.append(_Waiting(waiting, begin))
    if waiting:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        assert subprocess_handler.Popen is subprocess.Popen, "this release starts ranks in another way"
        subprocess_handler.Popen = _popen(waiting)  # type: ignore[misc]
        os.execv = _become  # type: ignore[assignment]
    sys.argv = ["gapo-mega", *order.arguments]
    begin()
    main()


def _redirect(order: Order) -> None:
    write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (path, mode) in enumerate(
        ((os.devnull, os.O_RDONLY), (order.output, write), (order.errors, write))
    ):
        opened = os.open(path, mode, 0o644)
        os.dup2(opened, number)
        os.close(opened)


def _fresh(environment: Mapping[str, str]) -> None:
    """What a new interpreter has: its environment, signals as they were, a clock, other random numbers."""
    from gapo_mega.whereabouts import enter

    environment = dict(environment)  # it may be that of this process
    os.environ.clear()
    os.environ.update(environment)
    # The shell may have told the process that loaded all to ignore some, as under nohup.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    random.seed()
    enter("start")


class _Waiting:
    """A fork that waits for the arguments and the environment of a rank."""

    def __init__(self, earlier: Sequence[_Waiting], begin: Callable[[], object]) -> None:
        read, self._write = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            for pipe in (self._write, *(other._write for other in earlier)):
                os.close(pipe)
            os.setsid()
            _alone(lambda: self._wait(read, begin))
        os.close(read)

    def go(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        with os.fdopen(self._write, "w") as pipe:
            pipe.write(json.dumps([list(arguments), dict(environment)]))

    def _wait(self, read: int, begin: Callable[[], object]) -> None:
        with os.fdopen(read) as pipe:
            text = pipe.read()
        if not text:  # the launcher has ended before it started ranks
            return
        arguments, environment = json.loads(text)
        _fresh(environment)
        begin()
        _module(arguments)


def _popen(waiting: list[_Waiting]) -> type:
    class Forked(subprocess.Popen[bytes]):
        """``Popen`` whose process is one of those that wait."""

        def _execute_child(self, args: Any, executable: Any, *others: Any) -> None:
            (environment,) = [other for other in others if isinstance(other, dict) and "RANK" in other]
            fork = waiting.pop(0)
            fork.go(args, environment)
            self.pid = fork.process
            self._child_created = True

    return Forked


def _become(path: str, command: Sequence[str]) -> NoReturn:
    """``os.execv`` of an interpreter with ``-m MODULE``: the same module in this process."""
    _fresh(os.environ)
    _module(command)
    sys.exit(0)


def _module(command: Sequence[str]) -> None:
    """``python [-u] -m MODULE ARGUMENTS``; of modules that are loaded already, their ``main``."""
    words = list(command)[1:]
    while words[0] != "-m":
        words.pop(0)
    name, arguments = words[1], words[2:]
    sys.argv = [name, *arguments]
    main = getattr(sys.modules.get(name), "main", None)
    if main is None:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        main()


def reap(process: int) -> int | None:
    """The exit code of a child, negative for a signal; None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return None if done == 0 else os.waitstatus_to_exitcode(status)


def wait(process: int, seconds: float) -> int | None:
    """As ``reap``, for so long."""
    end = time.monotonic() + seconds
    while (code := reap(process)) is None and time.monotonic() < end:
        time.sleep(0.01)
    return code
