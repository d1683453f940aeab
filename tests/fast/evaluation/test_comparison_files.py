"""Tables of a comparison, read back by what others would read them with."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gapo_mega.evaluation.comparison import Asked, Comparison, compare
from gapo_mega.evaluation.comparison_files import write_comparison
from gapo_mega.evaluation.comparison_tables import latex, markdown
from gapo_mega.evaluation.intervals import Resampling
from tests.helpers.answers import answers

BY_NAME = {
    "base_1": answers([0.0, 1.0, 5.0], text="<script>x</script>", short=1.0),
    "new|2": answers([1.5, 1.0, -5.0], short=2.0),
}


@pytest.fixture
def comparison() -> Comparison:
    asked = Asked(["kind", "short"], 1, {"kind": 0.0}, ("gcg", ["Sorry"]))
    return compare(BY_NAME, asked, Resampling(resamples=200))


def test_json_and_csv_hold_every_number(tmp_path: Path, comparison: Comparison) -> None:
    about = {"paths": {name: f"/models/{name}" for name in BY_NAME}, "reference": None, "prompt_source": "p"}
    write_comparison(tmp_path, comparison, BY_NAME, about, shown=2)
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["models"]["new|2"]["measures"]["objective/kind"]["mean"] == pytest.approx(-2.5 / 3)
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_key = {(row["model"], row["against"], row["measure"]): row for row in rows}
    for name, model in document["models"].items():
        for key, found in model["measures"].items():
            row = by_key[name, "", key]
            cells = [row[end] for end in ("value", "low", "high")]
            assert [float(cell) if cell else None for cell in cells] == list(found.values())
    (difference,) = [d for d in document["differences"] if d["measure"] == "objective/kind"]
    row = by_key["new|2", "base_1", "objective/kind"]
    assert float(row["value"]) == difference["estimate"]["mean"] == pytest.approx(-8.5 / 3)
    assert float(row["equal"]) == pytest.approx(1 / 3)
    assert row["finding"] == difference["finding"] == "too few prompts"


def test_markdown_has_one_cell_a_model(comparison: Comparison) -> None:
    tables = [line for line in markdown(comparison).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {4, 3}  # models, differences
    assert "new&#124;2" in tables[0]


def test_latex_escapes_and_sets_minus_signs(comparison: Comparison) -> None:
    text = latex(comparison)
    assert r"base\_1" in text and r"kind $>$ 0 (share)" in text and r"33\%" in text
    assert "$-0.8333$ [" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {row.count("&") for row in rows} == {2, 1}
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2


def test_the_page_needs_nothing_else_and_shows_text_as_text(tmp_path: Path, comparison: Comparison) -> None:
    about = {"paths": {name: name for name in BY_NAME}, "reference": "ref", "prompt_source": "p"}
    write_comparison(tmp_path, comparison, BY_NAME, about, shown=2)
    seen: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, dict(attrs)))

    text = (tmp_path / "index.html").read_text()
    Reader().feed(text)
    assert not {tag for tag, _ in seen} & {"script", "link", "img", "iframe"}
    assert not [attrs for _, attrs in seen if "src" in attrs or "href" in attrs]
    assert "&lt;script&gt;x&lt;/script&gt; 0" in text
    assert [tag for tag, _ in seen].count("article") == 2
