"""Lists of a checkpoint's files, against the CRC-32 of ``binascii`` and damage of every kind."""

from __future__ import annotations

import binascii
import json
import os
from pathlib import Path

import pytest

from gapo_mega.models.checkpoint_files import MARKER, check_sizes, fault, measured, names_in
from gapo_mega.models.huggingface.location import resolve

CONTENT = os.urandom(9 << 20)  # more than two of the pieces that are read at once


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "__0_0.distcp").write_bytes(CONTENT)
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "empty").touch()
    files = {name: measured(tmp_path / name) for name in names_in(tmp_path)}
    (tmp_path / MARKER).write_text(json.dumps({"step": 3, "files": files}))
    return tmp_path


def test_sizes_and_sums_are_those_of_the_bytes(checkpoint: Path) -> None:
    assert names_in(checkpoint) == ["__0_0.distcp", "empty", "hf/config.json"]
    found = measured(checkpoint / "__0_0.distcp")
    assert found == {"bytes": len(CONTENT), "crc32": f"{binascii.crc32(CONTENT):08x}"}
    assert measured(checkpoint / "empty") == {"bytes": 0, "crc32": "00000000"}


def test_zeros_in_the_middle_are_found_by_the_sum_alone(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    written = measured(path)
    assert fault(checkpoint, path.name, written) is None
    with path.open("r+b") as file:
        file.seek(5 << 20)
        file.write(bytes(4096))
    check_sizes(checkpoint, "--model")
    assert "__0_0.distcp has other contents than were written" in str(fault(checkpoint, path.name, written))


@pytest.mark.parametrize("size", [0, len(CONTENT) - 1, len(CONTENT) + 1])
def test_readers_refuse_another_size_and_name_the_file(checkpoint: Path, size: int) -> None:
    os.truncate(checkpoint / "__0_0.distcp", size)
    for reader in (lambda: check_sizes(checkpoint, "--model"), lambda: resolve(checkpoint, "--model")):
        with pytest.raises(ValueError) as caught:
            reader()
        line = str(caught.value)
        assert line.startswith(
            f"--model: found {checkpoint}, which is damaged: __0_0.distcp has {size} bytes"
        )
        assert str(len(CONTENT)) in line and "\n" not in line


def test_readers_refuse_a_missing_file(checkpoint: Path) -> None:
    (checkpoint / "hf" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"which is damaged: hf/config\.json is missing"):
        check_sizes(checkpoint, "model.path")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        bytes(500),
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"files": []}',
        b'{"files": {"a": 1}}',
        b'{"files": {"a": {"bytes": true, "crc32": "0"}}}',
        b'{"files": {"a": {"bytes": 1}}}',
    ],
)
def test_a_list_that_nobody_wrote_so_is_one_line(checkpoint: Path, content: bytes) -> None:
    (checkpoint / MARKER).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        check_sizes(checkpoint, "--from")
    assert "which is damaged: complete.json" in str(caught.value) and "\n" not in str(caught.value)


def test_directories_without_a_list_are_taken_as_they_are(checkpoint: Path) -> None:
    (checkpoint / "empty").unlink()
    (checkpoint / MARKER).write_text(json.dumps({"step": 3}))
    check_sizes(checkpoint, "--model")
    (checkpoint / MARKER).unlink()
    assert resolve(checkpoint) == checkpoint
