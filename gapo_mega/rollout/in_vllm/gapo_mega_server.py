"""Becomes vLLM's API server, which ends with the run that started it, however that one ends.

    python gapo_mega_server.py PARENT ARGUMENTS-OF-VLLM ...

When the parent is killed, Linux sends SIGTERM, at which vLLM ends its own processes, too.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> None:
    """Run ``vllm.entrypoints.openai.api_server`` with the arguments after the parent's process id."""
    parent = sys.argv.pop(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != int(parent):  # it was killed before the kernel knew
            sys.exit(128 + signal.SIGTERM)
    sys.argv[1:1] = arguments_here()  # before those of the run, of which the last counts
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def arguments_here() -> list[str]:
    """On CPUs, vLLM 0.32 fails at a prompt that is read in pieces and drawn from with a seed of its own.

    It takes back the number that was drawn after the first piece, which no generator of a CPU can do.
    """
    from vllm.platforms import current_platform  # which asks for devices, so the parent is watched first

    return ["--no-enable-chunked-prefill"] if current_platform.is_cpu() else []


if __name__ == "__main__":
    main()
