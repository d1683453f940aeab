"""JSON files row by row: what is read, and that every fault is named with its row and key."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gapo_mega.data.json_rows import json_rows

TWO = b'{"a": "x"}\n{"a": "y"}\n'


def rows(path: Path, content: bytes) -> list[tuple[int, object]]:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return list(json_rows(path))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "we[1]rd*?.jsonl", "a.json.jsonl"]
)
def test_lines_have_the_numbers_that_an_editor_shows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    expected = [(1, {"a": "x"}), (2, {"a": "y"})]
    for content in (TWO, TWO.rstrip(), TWO.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + TWO, b" " + TWO):
        assert rows(path, content) == expected
    assert rows(path, b"\n\n" + TWO.replace(b"}\n", b"}\n  \n")) == [(3, {"a": "x"}), (5, {"a": "y"})]
    assert rows(path, b'{"a": "2026-01-01", "b": "\xe2\x80\xa8", "c": "\\ud83d\\ude00", "d": null}') == [
        (1, {"a": "2026-01-01", "b": "\u2028", "c": "\U0001f600", "d": None})
    ]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_file_may_hold_one_array(tmp_path: Path, name: str) -> None:
    items = [{"a": i, "b": [{"c": "é"}]} for i in range(3)]
    for text in (json.dumps(items), json.dumps(items, indent=2), f"\ufeff \n{json.dumps(items)}\r\n", "[]"):
        expected = [] if text == "[]" else list(enumerate(items, start=1))
        assert rows(tmp_path / name, text.encode()) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TWO + b"{not json", "row 3: Expecting property name"),
        (TWO + b"[1]", "row 3: found an array, accepted: an object with the columns as keys"),
        (b'[{"a": "x"}]', "row 1: found an array"),
        (TWO + b'"x"', "row 3: found a text"),
        (TWO + b"null", "row 3: found null"),
        (TWO + b"3", "row 3: found a number"),
        (TWO + b'{"a": 1} {"a": 2}', "row 3: found more after its end, in column 9"),
        (TWO + b'{"a": "x", "a": "y"}', "row 3: key 'a' is given twice"),
        (TWO + b'{"m": [{"role": "user", "role": "x"}]}', "row 3: key 'role' is given twice"),
        (b'{"a": 1}\n{"b": {"c": [1, NaN]}}', r"row 2: key 'b.c\[1\]': found nan, accepted: a finite number"),
        (b'{"a": -Infinity}', "row 1: key 'a': found -inf"),
        (b'{"a": 1e999}', "row 1: key 'a': found inf"),
        (TWO + b'{"a": 1, "caf": "caf\xe9"}', "row 3: key 'caf': found the byte 0xe9, accepted: UTF-8 text"),
        (b'{"m": [{"content": "\\ud800"}]}', r"row 1: key 'm\[0\].content': found \\ud800 alone"),
        (b'{"caf\xe9": 1}', "row 1: key 'a key': found the byte 0xe9"),
        ('{"a": 1}'.encode("utf-16"), "row 1: Expecting value"),
        (b'{"a": ' + b"9" * 5000 + b"}", "row 1: Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000, "row 1: too deep"),
    ],
)
def test_a_fault_is_named_by_row_and_key(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        rows(tmp_path / "a.jsonl", content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, 3]', "row 2: found a number"),
        ('[{"a": 1} {"a": 2}]', "row 1: found no , or ] after it"),
        ('[{"a": 1}, ]', "row 2: Expecting value"),
        ('[{"a": 1}', "row 1: found no , or ] after it"),
        ('[{"a": 1}] x', "row 1: found text after the array's end"),
        ('[{"a": 1}, {"a": NaN}]', "row 2: key 'a': found nan"),
        ("[", "row 1: Expecting value"),
    ],
)
def test_a_fault_in_an_array_is_named_by_its_item(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        rows(tmp_path / "a.json", text.encode())


def test_a_row_is_read_only_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(TWO + b"{broken")
    reader = json_rows(path)
    assert [next(reader)[0], next(reader)[0]] == [1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(reader)
