"""Fixtures of the commands' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import worlds


@pytest.fixture
def one_process() -> Iterator[None]:
    worlds.enter(1, 1)
    yield
    worlds.leave()
