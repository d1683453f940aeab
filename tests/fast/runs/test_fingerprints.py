"""Fingerprints see one letter, an order, one weight; and not where the files lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gapo_mega.runs import fingerprints
from gapo_mega.runs.fingerprints import of_rows, of_text, of_weights

ROWS = [((1, 2), "a", ()), ((3,), "b", ({"role": "user", "content": "b"},))]


@pytest.mark.parametrize(
    "other",
    [
        ROWS[::-1],
        ROWS[:1],
        [*ROWS, ROWS[0]],
        [((1, 2), "A", ()), ROWS[1]],
        [((1, 3), "a", ()), ROWS[1]],
        [ROWS[0], ((3,), "b", ({"role": "user", "content": "c"},))],
    ],
)
def test_rows_that_differ(other: list[object]) -> None:
    assert of_rows(ROWS) == of_rows(list(ROWS))
    assert of_rows(other) != of_rows(ROWS)
    assert of_rows(other)["rows"] == len(other)


def test_rows_of_tensors_are_those_of_their_numbers() -> None:
    ids, mask = torch.tensor([5, 6]), torch.tensor([False, True])
    assert of_rows([(ids, mask)]) == of_rows([([5, 6], [False, True])])
    assert of_rows([(ids, ~mask)]) != of_rows([(ids, mask)])
    # Longer than what a printed tensor shows.
    long = torch.arange(5000)
    changed = long.clone()
    changed[2500] = 1
    assert of_rows([long]) != of_rows([changed])


def test_no_text_is_not_an_empty_one() -> None:
    assert of_text(None) != of_text("") != of_text("a") != of_text("b")


@pytest.mark.parametrize("whole", [True, False])
def test_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Read whole, one changed weight is seen; in pieces, training is, which changes all."""
    if not whole:
        monkeypatch.setattr(fingerprints, "_WHOLE", 1000)
        monkeypatch.setattr(fingerprints, "_PIECE", 100)
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    values = torch.from_numpy(np.random.default_rng(0).normal(size=5000))
    save_file({"w": values}, first / "model.safetensors")
    shutil.copytree(first, second)
    assert of_weights(first) == of_weights(second) == of_weights(first)
    assert of_weights(first)["bytes"] == (first / "model.safetensors").stat().st_size
    if whole:
        values[1234] += 1e-9
    else:
        values += 1e-9
    save_file({"w": values}, second / "model.safetensors")
    assert of_weights(first) != of_weights(second)
    (second / "model.safetensors").unlink()
    assert of_weights(second)["files"] == 0
