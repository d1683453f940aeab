"""Data files of all kinds: rows are used, left out and counted, or refused in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapo_mega.config import DataConfig
from gapo_mega.config.supervised import ChatData, PreferenceData
from gapo_mega.data.chats import load_chats
from gapo_mega.data.encoding import encode_chats, encode_pairs
from gapo_mega.data.pairs import load_pairs
from gapo_mega.data.preview import preview_prompts
from gapo_mega.data.prompts import load_prompts
from tests.helpers.fuzzing import TEXTS, VALUES, examples, one_line
from tests.helpers.small_tokenizers import TEMPLATE, word_tokenizer

TOKENIZER = word_tokenizer(chat_template=TEMPLATE)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": TEXTS}
)
CELL = st.one_of(
    st.just("w1 w2"), st.lists(TURN, max_size=4), st.just("\n\nHuman: w1\n\nAssistant: w2"), VALUES
)
COLUMNS = ("prompt", "response", "messages", "chosen", "rejected", "response_0", "response_1", "split",
           "safer_response_id", "better_response_id", "answer")  # fmt: skip
ROW = st.dictionaries(st.sampled_from(COLUMNS), CELL, max_size=4)
ROWS = st.one_of(
    st.lists(ROW, max_size=5),
    st.lists(
        st.fixed_dictionaries({"prompt": CELL, "chosen": CELL, "rejected": CELL}), min_size=1, max_size=5
    ),
    st.lists(st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}), min_size=1, max_size=5),
)


KINDS = st.sampled_from(["jsonl", "json", "jsonl.gz", "parquet"])


def column_of(cells: list[Any]) -> pyarrow.Array:
    """One type, where the cells have one, else what each is in JSON."""
    try:
        return pyarrow.array(cells)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return pyarrow.array([json.dumps(cell) for cell in cells])


def write_parquet(path: Path, rows: list[Any]) -> bool:
    """False for rows that parquet cannot hold: cells that are empty dictionaries."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: column_of([row.get(name) for row in rows]) for name in names})
    try:
        pyarrow.parquet.write_table(table, path)
    except pyarrow.ArrowException:
        return False
    return True


def file_of(folder: Path, rows: list[Any], kind: str) -> Path | None:
    path = folder / f"fuzzed.{kind}"
    if kind == "parquet":
        return path if write_parquet(path, rows) else None
    try:
        lines = [json.dumps(row) for row in rows]
    except (ValueError, RecursionError):
        return None  # what JSON cannot hold
    text = f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines)
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return path


def check(path: Path) -> None:
    """What every command makes of a file."""
    name = str(path)
    for columns in ({}, {"answer": "objective 'a': columns"}):
        data = DataConfig(source=name, heldout_prompts=1)
        previewed = one_line(lambda: preview_prompts(data, lambda: TOKENIZER, columns))  # noqa: B023
        loaded = one_line(lambda: load_prompts(data, TOKENIZER, 1, columns))  # noqa: B023
        assert loaded is None or previewed is not None
    pairs = one_line(lambda: load_pairs(PreferenceData(source=name), 1))
    if pairs is not None:
        one_line(lambda: encode_pairs(pairs[0], TOKENIZER, None, 50))
    chats = one_line(lambda: load_chats(ChatData(source=name), 1))
    if chats is not None:
        one_line(lambda: encode_chats(chats[0], TOKENIZER, None, 50))


@examples(60)
@given(rows=ROWS, kind=KINDS)
def test_rows_of_anything(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], kind: str) -> None:
    path = file_of(tmp_path_factory.getbasetemp(), rows, kind)
    if path is not None:
        check(path)


@examples(60)
@given(
    rows=ROWS,
    kind=KINDS,
    cut=st.integers(-200, 200),  # what parquet tells of itself is at the end
    put=st.binary(max_size=6),
)
def test_damaged_files(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], kind: str, cut: int, put: bytes
) -> None:
    path = file_of(tmp_path_factory.getbasetemp(), rows, kind)
    if path is None:
        return
    content = path.read_bytes()
    for damaged in (content[:cut] + put + content[cut:], content[:cut] + put, put + content[cut:], put):
        path.write_bytes(damaged)
        check(path)


@pytest.mark.parametrize("depth", [101, 500, 5_000, 200_000])
@pytest.mark.parametrize("cell", ['"\\ud800"', "1e999", "1"])
def test_a_deep_row_is_one_line(tmp_path: Path, depth: int, cell: str) -> None:
    """A number or a text that none is would be looked for by a walk through all of it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "w1"}\n{"prompt": ' + "[" * depth + cell + "]" * depth + "}\n")
    with pytest.raises(ValueError, match=r"^data\.source: .*row 2: .*too deep"):
        load_prompts(DataConfig(source=str(path)), TOKENIZER, 1)
