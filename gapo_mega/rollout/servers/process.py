"""A vLLM server that a run starts: its environment and command, its log, and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from gapo_mega.credentials import hidden
from gapo_mega.rollout import in_vllm
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.scratch import TEMPORARY, scratch

_HERE = Path(in_vllm.__path__[0])
_END_WITHIN = 20.0  # seconds between SIGTERM and SIGKILL
_LOG_STAYS = 7 * 86400.0  # seconds, of a server that has ended by itself
_LAST = 3  # lines of the log that an error shows
_given: set[int] = set()  # ports

# Of torchrun: vLLM would take them for a job of its own.
_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)


class ServerProcess:
    """One server of ``python``'s environment on this machine's loopback, started again whenever it is gone.

    Attributes:
        port: that it listens on; the same after a restart.
        starts: how often it was started.
        answered: whether it has since the last start, as whoever asks it says.
    """

    def __init__(
        self, python: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts nothing.

        Args:
            python: absolute path.
            arguments: of vLLM's API server, without host and port.
            environment: further variables, before those of this process.
        """
        self._python = python
        self._arguments = list(arguments)
        self._further = dict(environment or {})
        self.port = _free_port()
        self.starts = 0
        self.answered = False
        self._kept = ExitStack()
        self._folder, self._maker = self._kept.enter_context(
            scratch(Path(tempfile.gettempdir()), f"{TEMPORARY}vllm-", lasting=True)
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What it and vLLM's other processes print."""
        return self._folder / "vllm.log"

    def start(self) -> None:
        """Start it unless it runs; does not wait until it answers. ``ValueError`` if it is no program."""
        if self.is_alive():
            return
        self._end()  # what a killed server has left
        self.starts += 1
        self.answered = False
        command = [self._python, str(_HERE / "gapo_mega_server.py"), str(os.getpid()), *self._arguments]
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._folder,
                    start_new_session=True,  # Ctrl-C ends the run, which ends the server
                )
            except OSError as error:
                self.close()
                raise ValueError(
                    f"rollout.vllm.python: found {self._python}, which does not start ({error.strerror}), "
                    "accepted: the Python of an environment with vLLM"
                ) from error

    def is_alive(self) -> bool:
        """Whether its process runs, which says nothing of its answers."""
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raise ``ServerLost`` if it has ended."""
        if (told := self.how_it_ended()) is not None:
            raise ServerLost(told)

    def how_it_ended(self) -> str | None:
        """With which status and last words, and where its log is; None if it has not."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        return (
            f"rollout.vllm.python: found that the server of {self._python} ended with status {status}: "
            f"{self._last_lines()} ({self.log})"
        )

    def close(self) -> None:
        """End it, and remove its log; where it had ended by itself, that error names the log, which stays."""
        failed = self._process is not None and self._process.poll() is not None
        self._end()
        with suppress(OSError):
            if failed:
                self._maker.keep(_LOG_STAYS)
            self._kept.close()

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _end(self) -> None:
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_WITHIN)
        self.kill()
        self._process = None

    def _signal(self, number: int) -> None:
        # The group outlives its first process, if vLLM's engine is still there.
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not _of_launcher(name)}
        return {
            **kept,
            "PYTHONPATH": str(_HERE),  # nothing of this environment's
            "VLLM_SERVER_DEV_MODE": "1",  # which offers updates of the weights
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            **self._further,
        }

    def _last_lines(self) -> str:
        with suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            told = [line.strip() for line in lines if line.strip()]
            return " | ".join(hidden(line)[-200:] for line in told[-_LAST:]) or "it printed nothing"
        return "it left no log"


def _of_launcher(name: str) -> bool:
    return name in _LAUNCHER or name.startswith(("TORCHELASTIC_", "ROLE_"))


def _free_port() -> int:
    """One that nobody listens on, and that no other server of this process was given."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port
