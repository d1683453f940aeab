"""``responses.jsonl`` on the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gapo_mega.evaluation.answers import (
    append_answers,
    cut_answers,
    read_answers,
    whole_prompts,
    write_answers,
)
from tests.helpers.answers import answers


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    assert read_answers(path) == []
    given = answers([0.1, -2.0, 3e-9], samples=2)
    given[1] = replace(given[1], response="zwei\n\u2028Zeilen", kl=None)
    append_answers(path, given[:2])
    append_answers(path, given[2:])
    assert read_answers(path) == given
    write_answers(path, given[:1])
    assert read_answers(path) == given[:1]


@pytest.mark.parametrize("torn", [1, 20, 0])
def test_a_line_that_was_cut_off_is_none(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "responses.jsonl"
    given = answers([1.0, 2.0, 3.0])
    append_answers(path, given)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - torn])
    kept = given if torn == 0 else given[:2]
    assert read_answers(path) == kept
    cut_answers(path, 2)
    append_answers(path, given[2:])
    assert path.read_bytes() == data


def test_prompts_count_with_all_their_samples() -> None:
    given = answers([0.0] * 6, samples=2)
    assert [whole_prompts(given[:count], 2) for count in range(7)] == [0, 0, 1, 1, 2, 2, 3]
    assert whole_prompts([given[0], given[1], *given[4:]], 2) == 1
    assert whole_prompts([replace(given[0], number=1)], 1) == 0


def test_other_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    append_answers(path, answers([1.0]))
    with path.open("a") as file:
        file.write('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"responses\.jsonl, line 2: found no response"):
        read_answers(path)
