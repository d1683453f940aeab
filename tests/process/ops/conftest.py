"""The extension for the emulator of CUDA devices, compiled once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.cuda_emulation.build import build
from tests.helpers.cuda_emulation.extension import Emulated
from tests.helpers.cuda_emulation.memory import GuardedMemory


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(build(tmp_path_factory.mktemp("cuda_emulation")))


@pytest.fixture
def emulated(built: Emulated) -> Iterator[Emulated]:
    built.memory = GuardedMemory()
    built.configure()
    built.machine()
    yield built
    built.memory.check()
