"""Weights on their way to a server: every tensor is streamed, whatever fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gapo_mega.config import VllmConfig
from gapo_mega.rollout.servers.client import Patience, VllmServer
from gapo_mega.rollout.servers.transfers.files import Files


def stream(seen: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in "abcd":
        seen.append(name)
        yield name, torch.full((200_000,), float(len(seen)))


class Taking(VllmServer):
    """Keeps what it gets."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", Patience(1, 1, 1))
        self.pieces: list[dict[str, Tensor]] = []
        self.labels: list[str] = []

    def begin(self, end: float) -> None:
        assert not self.pieces

    def take(self, update: Mapping[str, Any], end: float) -> None:
        self.pieces.append(load_file(update["path"]))

    def finish(self, version: str, end: float) -> None:
        self.labels.append(version)


class Refusing(Taking):
    def take(self, update: Mapping[str, Any], end: float) -> None:
        raise KeyError(update["path"])


def files(place: Path, mib: int) -> Files:
    return Files(VllmConfig(url="http://127.0.0.1:1", weights_directory=str(place), piece_mib=mib))


def test_pieces_hold_what_fits_and_are_gone_afterwards(tmp_path: Path) -> None:
    server = Taking()
    sent = files(tmp_path, 2).send([server], stream([]), "third", math.inf)
    assert [list(piece) for piece in server.pieces] == [["a", "b"], ["c", "d"]]
    assert sent == 4 * 800_000 and server.labels == ["third"]
    found = server.pieces[0] | server.pieces[1]
    assert [float(found[name][0]) for name in "abcd"] == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == []


def test_the_stream_comes_to_its_end_where_nobody_takes_it(tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(KeyError, match="safetensors"):
        files(tmp_path, 1).send([Refusing()], stream(seen), "third", math.inf)
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
        files(place, 1).send([Taking()], stream(seen), "third", math.inf)
    assert seen == list("abcd"), "other ranks wait for one that leaves the stream"
    assert str(place) in str(told.value) and "\n" not in str(told.value)
