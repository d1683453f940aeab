"""How the workers of a local launcher ended: torchrun forgets it where it was itself told to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "GAPO_MEGA_EXITS"  # a launcher's directory, with a file for each worker
_INTERRUPTED = 130
# With which somebody ends a process, torchrun those that are left when one has failed.
_ENDING = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def noted() -> Iterator[None]:
    """Leave the exit code of the command in the block for the launcher that has started this process."""
    folder = os.environ.pop(FOLDER, None)  # not for what this process starts
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        code = _INTERRUPTED
        raise
    except BaseException:
        code = 1
        raise
    finally:
        if folder is not None:
            with suppress(OSError):  # the launcher was killed, and its directory is gone
                (Path(folder) / os.environ["RANK"]).write_text(str(code), encoding="ascii")


def left_in(folder: Path) -> list[int]:
    """The codes that workers have left there; there is none of those that a signal ended."""
    left = [path.read_text(encoding="ascii") for path in folder.glob("[0-9]*")]
    return [int(code) for code in left if code]  # a signal may come before it is written


def status_of(codes: Collection[int]) -> int:
    """The exit code of a launcher whose workers ended with these, negative for a signal.

    It is that of all workers that failed by themselves, where they agree, and 0 where all came to their end;
    else 1.
    """
    failed = {code for code in codes if code != 0 and -code not in _ENDING}
    if not failed:
        return 0 if codes and not any(codes) else 1
    return max(1, failed.pop()) if len(failed) == 1 else 1
