"""What the tests of strategies share: process groups that end with the file, and a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; a file with models of its own has a fixture of this name."""
    directory = tmp_path_factory.mktemp("gradients") / "model"
    tiny_llama(directory)
    return directory
