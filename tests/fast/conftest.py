"""Fast tests start no process and import no engine; here that is kept."""

from __future__ import annotations

import multiprocessing.process
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

HERE = Path(__file__).resolve().parent


def refuse(*arguments: Any, **options: Any) -> NoReturn:
    # As where a program is missing: libraries that only look for one do without.
    raise PermissionError(
        f"a test of tests/fast starts a process: {arguments[1:]}; it belongs in tests/process"
    )


@pytest.fixture(scope="session")
def only_fast_tests(request: pytest.FixtureRequest) -> bool:
    """Whether no other tests run in this process, which may have imported the engine."""
    return all(item.path.is_relative_to(HERE) for item in request.session.items)


@pytest.fixture(autouse=True)
def neither_process_nor_engine(monkeypatch: pytest.MonkeyPatch, only_fast_tests: bool) -> Iterator[None]:
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    yield
    assert not only_fast_tests or "megatron" not in sys.modules, "the engine belongs in tests/engine"
