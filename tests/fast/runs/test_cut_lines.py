"""Lines that a resumed run cuts from the log are kept."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from gapo_mega.runs.cut_lines import check_lines, keep_cut_lines


def write(directory: Path, steps: range, more: str = "") -> list[str]:
    lines = [json.dumps({"step": step, "kl": 0.1 * step}) + "\n" for step in steps]
    (directory / "metrics.jsonl").write_text("".join(lines) + more)
    return lines


def test_what_is_cut_lies_beside_the_log(tmp_path: Path) -> None:
    lines = write(tmp_path, range(1, 9), '{"step": 9, "k')
    assert keep_cut_lines(tmp_path, 8) is None
    first = keep_cut_lines(tmp_path, 5)
    assert first == tmp_path / "metrics.cut-1.jsonl" and first.read_text() == "".join(lines[5:])
    second = keep_cut_lines(tmp_path, 0)
    assert second == tmp_path / "metrics.cut-2.jsonl" and second.read_text() == "".join(lines)
    assert first.read_text() == "".join(lines[5:])


def test_steps_of_the_checkpoint_that_the_log_lacks_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, range(3, 5))
    assert keep_cut_lines(tmp_path, 6) is None
    assert "lacks 4 of the 6 optimizer steps" in caplog.text


@pytest.mark.parametrize("line", ["hello\n", "[1]\n", '{"loss": 1}\n', "\n"])
def test_a_line_of_something_else_is_one_line_of_error(tmp_path: Path, line: str) -> None:
    check_lines(tmp_path)
    write(tmp_path, range(1, 3), line)
    with pytest.raises(ValueError, match=r"^output_dir: .*metrics\.jsonl, line 3: found "):
        check_lines(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 4096,
        b'{"step": 3, "a": "\xff"}',
        b'{"step": "3"}',
        b'{"step": 3.5}',
        b'{"step": true}',
        b'{"step": 1e999}',
        b'{"step": NaN}',
        b'{"step": 3',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_told_with_the_command_that_repairs_the_log(tmp_path: Path, line: bytes) -> None:
    folder = tmp_path / "a run's"
    folder.mkdir()
    lines = write(folder, range(1, 4))
    log = folder / "metrics.jsonl"
    log.write_bytes(lines[0].encode() + line + b"\n" + "".join(lines[1:]).encode())
    damaged = log.read_bytes()
    with pytest.raises(ValueError, match=r"^output_dir: .*metrics\.jsonl, line 2: found ") as raised:
        check_lines(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    command = shlex.split(str(raised.value).rpartition("copy: ")[2][:-1])
    assert command == ["sed", "-i.damaged", "2d", str(log)]
    kept = [text for at, text in enumerate(damaged.split(b"\n")[:-1], 1) if at != 2]
    log.write_bytes(b"".join(text + b"\n" for text in kept))  # what the command does
    check_lines(folder)
    assert log.read_text() == "".join(lines)
