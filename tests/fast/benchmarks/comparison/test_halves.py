"""Halves of preference files: nothing is lost, and what begins alike stays together."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.comparison.halves import app, divided

BEGINS = [f"\n\nHuman: question {i}" for i in range(40)]


def lines(answer: str) -> list[str]:
    return [
        json.dumps({"chosen": f"{text}\n\nAssistant: {answer}", "rejected": "r"}) + "\n" for text in BEGINS
    ]


def test_every_pair_is_in_one_half_with_all_that_begin_alike(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text("".join(lines("first")))
    with gzip.open(packed, "wt") as file:
        file.writelines(lines("second"))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [f"one={plain}", f"two={packed}", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = {
        (half, name): (out / half / f"{name}.jsonl").read_text().splitlines(keepends=True)
        for half in ("rewards", "judges")
        for name in ("one", "two")
    }
    for name, answer in (("one", "first"), ("two", "second")):
        assert sorted(found["rewards", name] + found["judges", name]) == sorted(lines(answer))
        assert min(len(found["rewards", name]), len(found["judges", name])) > 8
    assert [line.replace("first", "second") for line in found["judges", "one"]] == found["judges", "two"]


def test_a_line_that_is_no_pair_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(lines("x")[0] + '{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: found no text 'chosen'"):
        divided(file)
    done = CliRunner().invoke(app, ["nothing.jsonl"])
    assert done.exit_code == 1 and "NAME=FILE: found 'nothing.jsonl'" in str(done.exception or done.output)
