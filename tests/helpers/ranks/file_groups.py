"""No process group outlives the file that made it: files share a process, and meet in any order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gapo_mega.engine.megatron.runtime import groups
from tests.helpers.ranks import worlds


@pytest.fixture(scope="module", autouse=True)
def groups_end_with_the_file() -> Iterator[None]:
    yield
    worlds.leave()
    groups.shutdown()
