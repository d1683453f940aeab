"""Becomes a command of this package that ends with the process that started it, however that one ends.

    python -m gapo_mega.runs.tethered PARENT COMMAND ...

When the parent is killed, Linux sends SIGTERM, after which a run writes a checkpoint. Elsewhere the command
goes on without its parent, which finds it in its directory when it starts again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h; it outlasts execve


def main() -> None:
    """Become ``gapo-mega COMMAND ...``."""
    parent, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != int(parent):  # it was killed before the kernel knew
            sys.exit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", "gapo_mega.cli", *arguments])


if __name__ == "__main__":
    main()
