"""Rows of files and directories: names taken literally, contents read anew, splits and subsets."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from gapo_mega.data.tables import Source, Table, check_column, read_rows

TWO = '{"prompt": "%s"}\n{"prompt": "b"}\n'


def source(name: Path | str, split: str = "train", subset: str | None = None) -> Source:
    return Source("data.source", str(name), "data.split", split, "data.subset", subset)


def texts(table: Table, column: str = "prompt") -> list[Any]:
    return [row[column] for _, row in table]


def parquet(path: Path, *prompts: str, column: str = "prompt") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list([{column: prompt} for prompt in prompts]).to_parquet(str(path))
    return path


def failure(wanted: Source, limit: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        read_rows(wanted, limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a[1]", "a?", "a*", "[!a]", "{a,b}", "a b", "$HOME", "%20", "a#b"])
@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ""])
def test_a_name_means_itself(tmp_path: Path, name: str, kind: str) -> None:
    """Beside each file lie those that its name, taken for a pattern, would mean."""
    for other, content in [("a1", "wrong"), ("a", "wrong"), ("ab", "wrong"), ("b", "wrong"), (name, "right")]:
        path = tmp_path / f"{other}{kind}"
        if kind == ".jsonl":
            path.write_text(TWO % content)
        else:
            parquet(path if kind else path / "train.parquet", content, "b")
    assert texts(read_rows(source(tmp_path / f"{name}{kind}"))) == ["right", "b"]
    assert texts(read_rows(source(tmp_path / f"{name}{kind}"), 1)) == ["right"]


def test_names_in_a_directory_mean_themselves(tmp_path: Path) -> None:
    names = ["$HOME/data.parquet", "data$HOME.parquet", "data1.parquet", "data[1].parquet", "x/data*.parquet"]
    for name in names:
        parquet(tmp_path / "all" / name, name)
    assert sorted(texts(read_rows(source(tmp_path / "all")))) == names


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
def test_content_is_read_anew_whatever_its_time_stamp(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    file = path / "train.jsonl" if name == "folder" else path
    file.parent.mkdir(exist_ok=True)
    for content in ("x", "y"):
        if name == "a.parquet":
            parquet(file, content)
        else:
            file.write_text(TWO % content)
        os.utime(file, ns=(10**18, 10**18))
        table = read_rows(source(path))
        assert texts(table)[0] == content
        assert texts(read_rows(source(path), 1)) == [content]
    assert [number for number, _ in table] == list(range(1, len(table) + 1))


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(TWO % "x")
    parquet(tmp_path / "d" / "train.parquet", "y")
    assert texts(read_rows(source("~/a.jsonl"))) == ["x", "b"] and texts(read_rows(source("~/d"))) == ["y"]
    monkeypatch.chdir(tmp_path)
    assert texts(read_rows(source("a.jsonl"))) == ["x", "b"] and texts(read_rows(source("d"))) == ["y"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    good = parquet(tmp_path / "good.parquet", *[str(i) for i in range(1000)])
    content = good.read_bytes()
    cases = {
        "cut.parquet": content[:-100],
        "start.parquet": b"XXXX" + content[4:200],
        "hole.parquet": content[:20] + b"\xff" * 200 + content[220:],
        "text.parquet": b"no parquet at all",
    }
    for name, damaged in cases.items():
        (tmp_path / name).write_bytes(damaged)
        message = failure(source(tmp_path / name))
        assert message.startswith(f"data.source: file '{tmp_path / name}' not readable as .parquet: ")
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl' is a directory, accepted: a file" in failure(source(tmp_path / "folder.jsonl"))
    (tmp_path / "blank.jsonl").write_text("\n \n")
    assert "blank.jsonl' has no rows" in failure(source(tmp_path / "blank.jsonl"))
    (tmp_path / "none.json").write_text("[]")
    assert "none.json' has no rows" in failure(source(tmp_path / "none.json"))
    (tmp_path / "rows.csv").write_text("a,b")
    assert "(a file with another ending)" in failure(source(tmp_path / "rows.csv"))
    assert "(no such directory)" in failure(source(tmp_path / "nowhere"))
    (tmp_path / "twice.jsonl").write_text('{"a": 1}\n{"a": 1, "a": 2}\n')
    assert failure(source(tmp_path / "twice.jsonl")).endswith(
        "twice.jsonl' not readable as .jsonl: row 2: key 'a' is given twice"
    )
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in failure(source(tmp_path / "empty"))


def test_parquet_holds_what_was_written(tmp_path: Path) -> None:
    rows = [{"m": [{"role": "user", "content": "x", "name": None}], "d": "2026-01-01"}, {"m": None, "d": "é"}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    table = read_rows(source(tmp_path / "a.parquet"))
    assert list(table) == [(1, rows[0]), (2, rows[1])] and list(table.columns) == ["m", "d"]


def test_columns_are_those_of_all_rows_and_splits_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": 2, "split": "test"}\n{"a": 3, "split": "train"}\n')
    table = read_rows(source(path))
    assert list(table) == [(3, {"a": 3, "split": "train"})] and {*table.columns} == {"a", "b", "split"}
    check_column("data.prompt_column", "b", table)
    assert [number for number, _ in read_rows(source(path, "test"))] == [2]
    assert failure(source(path, "dev")).startswith("data.split: found 'dev', accepted for ")


def test_subsets_are_chosen_and_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a" / "train.parquet", "of a")
    parquet(tmp_path / "b" / "train.parquet", "of b", column="question")
    folders = source(tmp_path)
    assert failure(folders).startswith(f"data.subset: found nothing for '{tmp_path}'")
    assert failure(folders).endswith("accepted: a, b")
    assert texts(read_rows(source(tmp_path, subset="a"))) == ["of a"]
    assert failure(source(tmp_path, subset="c")) == f"data.subset: found 'c', accepted for '{tmp_path}': a, b"
    configs = "".join(
        f"- config_name: {n}\n  data_files: {f}/*.parquet\n" for n, f in (("x", "a"), ("y", "b"))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert failure(source(tmp_path)) == f"data.subset: found nothing, accepted for '{tmp_path}': x, y"
    assert (
        failure(source(tmp_path, subset="c"), 3) == f"data.subset: found 'c', accepted for '{tmp_path}': x, y"
    )
    assert texts(read_rows(source(tmp_path, subset="x"))) == ["of a"]
    assert texts(read_rows(source(tmp_path, subset="y"), 3), "question") == ["of b"]
    for limit in (None, 3):
        assert failure(source(tmp_path, "dev", "y"), limit).startswith("data.split: found 'dev' of ")
    file = parquet(tmp_path / "one.parquet", "x")
    assert failure(source(file, subset="x")).startswith(
        f"data.subset: found 'x' with the file '{file}', accepted"
    )


def test_folders_that_are_read_together_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("helpful", "harmless"):
        parquet(tmp_path / name / "train.parquet", name)
    with caplog.at_level(logging.INFO):
        assert sorted(texts(read_rows(source(tmp_path)))) == ["harmless", "helpful"]
    assert "the folders harmless, helpful are read together" in caplog.text
    assert texts(read_rows(source(tmp_path, subset="helpful"))) == ["helpful"]


def test_rows_without_a_split_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "split": "train"}\n{"prompt": "b"}\n{"prompt": "c", "split": null}\n')
    assert texts(read_rows(source(path))) == ["a"]
    assert "left out 2 rows without a value of 'split', which others have: rows 2, 3" in caplog.text


@pytest.mark.parametrize("split", ["train[:1]", "train+test", "train[50%:]"])
def test_a_part_of_a_split_is_no_part_of_a_file(tmp_path: Path, split: str) -> None:
    """All rows of the file would be read; of a directory, datasets takes the part."""
    (tmp_path / "folder").mkdir()
    for name in ("a.jsonl", "folder/train.jsonl", "folder/test.jsonl"):
        (tmp_path / name).write_text(TWO % "a")
    message = failure(source(tmp_path / "a.jsonl", split))
    assert message.startswith(f"data.split: found {split!r}, accepted for the file")
    expected = ["a", "b", "a", "b"] if "+" in split else ["a" if ":1" in split else "b"]
    assert texts(read_rows(source(tmp_path / "folder", split))) == expected


def test_a_cell_that_python_cannot_hold_is_named(tmp_path: Path) -> None:
    times = pa.array([0, 10**18], pa.timestamp("us"))
    offsets, data = np.array([0, 1, 3], dtype=np.int32), b"ok\xfc"
    texts_of_bytes = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    for column, found in (
        (times, "a value that Python cannot hold"),
        (texts_of_bytes, "the byte 0xfc, accepted: UTF-8"),
    ):
        pq.write_table(pa.table({"prompt": ["a", "b"], "x": column}), tmp_path / "a.parquet")
        assert f"row 2: key 'x': found {found}" in failure(source(tmp_path / "a.parquet"))


def test_a_directorys_row_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "\xfc"}\n')
    with pytest.raises(
        ValueError, match=r"^data.source '.*', row 3: found the byte 0xfc, accepted: UTF-8 text$"
    ):
        texts(read_rows(source(tmp_path)))


def test_what_save_to_disk_wrote_has_its_own_rows_alone(tmp_path: Path) -> None:
    """``map`` leaves its results beside them, which ``load_dataset`` takes for rows."""
    splits = {
        "train": Dataset.from_dict({"prompt": ["a", "b"]}),
        "test": Dataset.from_dict({"prompt": ["c"]}),
    }
    path = tmp_path / "saved[1]"
    DatasetDict(splits).save_to_disk(str(path))
    load_from_disk(str(path))["train"].map(lambda row: {"prompt": row["prompt"] + "!"})
    assert len(list((path / "train").glob("*.arrow"))) == 2
    assert texts(read_rows(source(path))) == ["a", "b"] and texts(read_rows(source(path), limit=1)) == ["a"]
    assert texts(read_rows(source(path, "test"))) == ["c"]
    assert failure(source(path, "dev")).endswith(": test, train")
    assert "data.subset" in failure(source(path, subset="train"))
    assert texts(read_rows(source(path / "train"))) == ["a", "b"]
    (path / "train" / "state.json").write_text("{")
    assert failure(source(path / "train")).startswith(f"data.source: found {str(path / 'train')!r}")


def test_a_data_set_without_splits_that_save_to_disk_wrote_is_one(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "one"))
    for split in ("train", "test"):
        assert texts(read_rows(source(tmp_path / "one", split))) == ["a"]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a/" + "b" * 5000])
def test_a_name_that_no_file_system_takes_is_one_line(name: str) -> None:
    assert not source(name).is_on_the_hub
    assert failure(source(name)).endswith("(no such directory)")
    assert failure(source(f"{name}.jsonl")).endswith("not found")


def test_a_directory_of_many_other_files_is_refused_before_all_are_looked_at() -> None:
    """As the root, or a home."""
    begun = time.process_time()
    found = failure(source("/"))
    assert found.startswith("data.source: found '/' with more than 20000 files and directories below it, acc")
    assert time.process_time() - begun < 5  # a tenth of it; all files take minutes
