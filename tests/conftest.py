"""What test files of every folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

SMOLLM2 = Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of a real pretrained model with its tokenizer."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip(f"models/{SMOLLM2.name} is not there; `make test` converts it")
    return SMOLLM2
