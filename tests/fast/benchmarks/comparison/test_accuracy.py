"""A reward model's share of right preferences, ties and all."""

from __future__ import annotations

import json
import math
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.comparison.accuracy import app, row, scored
from gapo_mega import objectives
from gapo_mega.config import ObjectiveConfig
from gapo_mega.data.pairs import Pair
from tests.helpers.hf_directories import classifier
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer

PROMPT = ({"role": "user", "content": "Why?"},)
PAIRS = [Pair(PROMPT, "a", "bb"), Pair(PROMPT, "aaa", "b"), Pair(PROMPT, "a", "b"), Pair(PROMPT, "", "b")]


def test_a_pair_counts_by_its_scores() -> None:
    judge = objectives.build(ObjectiveConfig(name="short", function="tests.helpers.rewards:short"))
    scores = scored(judge, PAIRS)
    assert [(a > b) + (a == b) / 2 for a, b, _, _ in scores] == [1, 0, 0.5, 1]
    assert row("short", scores) == ("short", "4", "0.625", f"{math.sqrt(0.625 * 0.375 / 4):.3f}", "0.250")


def test_the_command_reads_a_model_and_pairs(tmp_path: Path) -> None:
    byte_tokenizer(classifier(tmp_path / "model"), CHAT_TEMPLATE)
    begin = "\n\nHuman: Why?\n\nAssistant: "
    rows = [{"chosen": f"{begin}yes {i}", "rejected": f"{begin}no {i}"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    out = tmp_path / "table.md"
    given = [
        f"kind={tmp_path / 'model'}={tmp_path / 'pairs.jsonl'}",
        "--max-tokens",
        "64",
        "--limit",
        "2",
        "--out",
        str(out),
    ]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 0, found.output
    assert out.read_text().splitlines()[2].startswith("| kind | 2 | ")
    again = tmp_path / "again.md"
    found = CliRunner().invoke(app, ["--known", str(out.with_suffix(".json")), "--out", str(again)])
    assert found.exit_code == 0 and again.read_text() == out.read_text()
    refused = CliRunner().invoke(app, ["kind=model", "--out", str(out)])
    assert refused.exit_code == 1 and "found 'kind=model'" in refused.output
    refused = CliRunner().invoke(app, ["--out", str(out)])
    assert refused.exit_code == 1 and "found none, accepted: some, or --known" in refused.output
