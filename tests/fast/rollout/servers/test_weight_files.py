"""Weights on their way to a server: every tensor is streamed, whatever fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gapo_mega.rollout.servers.weight_files import hand_over

MIB = 1 << 20


def stream(seen: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in "abcd":
        seen.append(name)
        yield name, torch.full((200_000,), float(len(seen)))


def test_pieces_hold_what_fits_and_are_gone_afterwards(tmp_path: Path) -> None:
    found: dict[str, Tensor] = {}
    sizes: list[int] = []

    def take(path: str) -> None:
        piece = load_file(path)
        sizes.append(len(piece))
        found.update(piece)

    total = hand_over(stream([]), 2 * MIB, str(tmp_path), take)
    assert sizes == [2, 2] and total == 4 * 800_000
    assert [float(found[name][0]) for name in "abcd"] == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == []


def test_the_stream_comes_to_its_end_where_nobody_takes_it(tmp_path: Path) -> None:
    seen: list[str] = []

    def take(path: str) -> None:
        raise KeyError(path)

    with pytest.raises(KeyError, match="safetensors"):
        hand_over(stream(seen), MIB, str(tmp_path), take)
    assert seen == list("abcd") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "file", "full"])
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "weights"
    if kind == "file":
        place.write_text("")
    elif kind == "full":
        place = Path("/dev/full/..") / "full"  # a device: no directory, and never room
    seen: list[str] = []
    with pytest.raises(ValueError, match=r"^rollout.vllm.weights_directory: weights cannot be .* \(") as told:
        hand_over(stream(seen), MIB, str(place), lambda path: None)
    assert seen == list("abcd"), "other ranks wait for one that leaves the stream"
    assert str(place) in str(told.value) and "\n" not in str(told.value)
