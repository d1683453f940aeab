"""Preference pairs: every format, what is left out, held-out prompts."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config.supervised import ObjectivePairs, PairObjective, PreferenceData
from gapo_mega.data.pairs import Pair, load_objectives, load_pairs


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def data(source: str, **changes: Any) -> PreferenceData:
    return PreferenceData.model_validate({"source": source, "heldout_fraction": 0, **changes})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def transcript(*turns: str) -> str:
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_transcripts(tmp_path: Path) -> None:
    rows = [
        {"chosen": transcript("Hi", "Good day."), "rejected": transcript("Hi", "What?\n\nWho?")},
        {"chosen": transcript("a", "b", "c: d", "Human: no"), "rejected": transcript("a", "b", "c: d", "f")},
    ]
    train, heldout = load_pairs(data(write(tmp_path / "a.jsonl.gz", rows)), seed=0)
    assert heldout == []
    assert train == [
        Pair((user("Hi"),), "Good day.", "What?\n\nWho?"),
        Pair((user("a"), assistant("b"), user("c: d")), "Human: no", "f"),
    ]
    for pair, row in zip(train, rows, strict=True):
        for response in ("chosen", "rejected"):
            said = [m["content"] for m in pair.answered(getattr(pair, response))]
            assert transcript(*said) == row[response]


def test_unusable_rows_are_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, twice = transcript("q", "good"), "\n\nHuman: q\n\nHuman: q\n\nAssistant: "
    rows = [
        {"chosen": good, "rejected": transcript("q", "bad")},
        {"chosen": good, "rejected": transcript("other", "bad")},
        {"chosen": transcript("q", "x", "y", "z"), "rejected": transcript("q", "bad")},
        {"chosen": good, "rejected": transcript("q", " good ")},
        {"chosen": good, "rejected": transcript("q", " ")},
        {"chosen": transcript("", "a"), "rejected": transcript("", "b")},
        {"chosen": twice + "a", "rejected": twice + "b"},
        {"chosen": transcript("q", "a", "and then?"), "rejected": transcript("q", "a", "so?")},
        {"chosen": good, "rejected": "no transcript"},
        {"chosen": None, "rejected": good},
    ]  # fmt: skip
    with caplog.at_level(logging.INFO):
        train, _ = load_pairs(data(write(tmp_path / "a.jsonl", rows)), seed=0)
    assert train == [Pair((user("q"),), "good", "bad")]
    expected = (
        "1 pairs of 10 rows, left out: 2 empty, 1 identical, 2 malformed, 2 turns out of order, "
        "2 with different prompts"
    )
    assert expected in caplog.text
    with pytest.raises(
        ValueError, match=r"^data.source '.*' .*: found no usable pairs in 1 rows .*1 identical"
    ):
        load_pairs(data(write(tmp_path / "b.jsonl", rows[3:4])), seed=0)


def test_pku_rows_by_objective(tmp_path: Path) -> None:
    responses = {"response_0": "zero", "response_1": "one"}
    rows: list[dict[str, Any]] = [
        {"prompt": "p", **responses, "better_response_id": 0, "safer_response_id": 1},
        {"prompt": "q", **responses, "better_response_id": 1, "safer_response_id": None},
    ]
    source = write(tmp_path / "a.jsonl", rows)
    first, second = Pair((user("p"),), "zero", "one"), Pair((user("q"),), "one", "zero")
    assert load_pairs(data(source, objective="helpful"), seed=0)[0] == [first, second]
    harmless, _ = load_pairs(data(source, format="pku", objective="harmless"), seed=0)
    assert harmless == [Pair((user("p"),), "one", "zero")]
    with pytest.raises(ValueError, match=r"^data.objective: found nothing, accepted .*helpful, harmless"):
        load_pairs(data(source), seed=0)
    bare = write(tmp_path / "b.jsonl", [{k: row[k] for k in row if k != "safer_response_id"} for row in rows])
    with pytest.raises(
        ValueError, match=r"^data.format: found pku .* has no column safer_response_id; accepted"
    ):
        load_pairs(data(bare, objective="harmless"), seed=0)


def test_columns_of_texts_and_of_messages(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    asked = [system, user("u")]
    expected = Pair((system, user("u")), "good", "bad")
    texts = write(tmp_path / "a.jsonl", [{"ask": asked, "win": "good", "lose": "bad"}])
    names = {"prompt_column": "ask", "chosen_column": "win", "rejected_column": "lose"}
    assert load_pairs(data(texts, **names), seed=0)[0] == [expected]
    whole = {
        "prompt": "not read",
        "chosen": [*asked, assistant("good")],
        "rejected": [*asked, assistant("bad")],
    }
    assert load_pairs(data(write(tmp_path / "b.jsonl", [whole])), seed=0)[0] == [expected]
    answers = {"prompt": "u", "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    assert load_pairs(data(write(tmp_path / "c.jsonl", [answers])), seed=0)[0] == [
        Pair((user("u"),), "good", "bad")
    ]
    for column, missing in (("chosen_column", "x"), ("rejected_column", "y"), ("prompt_column", "z")):
        with pytest.raises(
            ValueError, match=rf"^data.{column}: found '{missing}', accepted .*: ask, lose, win"
        ):
            load_pairs(data(texts, format="columns", **{**names, column: missing}), seed=0)
    with pytest.raises(
        ValueError, match=r"^data.format: found auto .* ask, lose, win, accepted: columns chosen"
    ):
        load_pairs(data(texts), seed=0)
    odd = {"chosen_column": "x" * 5000, "rejected_column": "a\x85b"}
    with pytest.raises(
        ValueError, match=r"accepted: columns 'x{36}\.\.\. and 'a\\x85b' \(data\.chosen"
    ) as told:
        load_pairs(data(texts, **odd), seed=0)
    assert len(str(told.value)) < 500
    with pytest.raises(
        ValueError, match=r"^data.objective: found helpful .* format is columns; accepted: null"
    ):
        load_pairs(data(texts, objective="helpful", **names), seed=0)


def test_transcripts_beside_a_prompt_are_not_taken_for_responses(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": transcript("q", "a"), "rejected": transcript("q", "b")}
    assert load_pairs(data(write(tmp_path / "a.jsonl", [row])), seed=0)[0] == [Pair((user("q"),), "a", "b")]


def prompts(pairs: Sequence[Pair]) -> set[str]:
    return {pair.prompt[0]["content"] for pair in pairs}


def test_prompts_are_held_out_whole_and_by_seed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{i % 40}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(120)
    ]
    config = data(write(tmp_path / "a.jsonl", rows), heldout_fraction=0.1)
    train, heldout = load_pairs(config, seed=3)
    assert len(heldout) == 12 and len(train) == 108
    assert len(prompts(heldout)) == 4 and not prompts(train) & prompts(heldout)
    assert load_pairs(config, seed=3) == (train, heldout)
    assert prompts(load_pairs(config, seed=4)[1]) != prompts(heldout)
    backwards = data(write(tmp_path / "b.jsonl", rows[::-1]), heldout_fraction=0.1)
    assert prompts(load_pairs(backwards, seed=3)[1]) == prompts(heldout)
    # A rare share holds out one prompt, never none.
    assert len(prompts(load_pairs(data(config.source, heldout_fraction=1e-3), seed=3)[1])) == 1


def test_turns_of_one_conversation_stay_together(tmp_path: Path) -> None:
    rows = []
    for i in range(20):
        rows.append({"chosen": transcript(f"q{i}", "a"), "rejected": transcript(f"q{i}", "b")})
        rows.append(
            {"chosen": transcript(f"q{i}", "a", "c", "d"), "rejected": transcript(f"q{i}", "a", "c", "e")}
        )
    train, heldout = load_pairs(data(write(tmp_path / "a.jsonl", rows), heldout_fraction=0.25), seed=0)
    assert len(heldout) == 10 and not prompts(train) & prompts(heldout)


def test_heldout_source_and_its_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r", "split": "ab"[i % 2]} for i in range(6)]
    rows.append({"prompt": "p1", "chosen": "x", "rejected": "y", "split": "a"})
    source = write(tmp_path / "a.jsonl", rows)
    config = data(source, split="a", heldout_source=source, heldout_split="b")
    train, heldout = load_pairs(config, seed=0)
    assert prompts(train) == {"p0", "p2", "p4"} and prompts(heldout) == {"p1", "p3", "p5"}
    with pytest.raises(ValueError, match=r"^data.heldout_split: found 'test', accepted .*: a, b"):
        load_pairs(data(source, split="a", heldout_source=source), seed=0)
    with pytest.raises(ValueError, match=r"^data.heldout_source: found .* which holds out every prompt of"):
        load_pairs(data(source, split="a", heldout_source=source, heldout_split="a"), seed=0)
    with pytest.raises(
        ValueError, match=r"^data.heldout_fraction: found 0.5, which holds out every prompt of"
    ):
        load_pairs(data(write(tmp_path / "b.jsonl", rows[:1]), split="a", heldout_fraction=0.5), seed=0)


@pytest.mark.parametrize("prompt", ["another question", [{"role": "system", "content": "s"}, *[user("q")]]])
def test_a_prompt_beside_whole_conversations_is_told_to_be_unread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prompt: Any
) -> None:
    answers = [[user("q"), {"role": "assistant", "content": text}] for text in ("good", "bad")]
    rows = [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}]
    with caplog.at_level(logging.INFO):
        train, _ = load_pairs(data(write(tmp_path / "a.jsonl", rows)), seed=0)
    assert train == [Pair((user("q"),), "good", "bad")]
    assert "columns that are not read: prompt" in caplog.text


def test_margins_of_other_objectives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i}", "chosen": "yes", "rejected": "no", "safe": i - 2, "kind": 0.5} for i in range(4)
    ]
    rows[3] |= {"safe": "high"}
    source = write(tmp_path / "a.jsonl", rows)
    found = ObjectivePairs(source=source, heldout_fraction=0, margins={"safe": 0.25, "kind": -2.0})
    with caplog.at_level(logging.INFO):
        train, _ = load_pairs(found, seed=0)
    assert [pair.margin for pair in train] == [-1.5, -1.25, -1.0]
    assert "1 malformed" in caplog.text and "not read" not in caplog.text
    with pytest.raises(
        ValueError, match=r"^data\.margins\.sage: found 'sage', accepted for .*: chosen, kind"
    ):
        load_pairs(ObjectivePairs(source=source, margins={"sage": 1.0}), seed=0)


def objective(name: str, source: str, **changes: Any) -> PairObjective:
    return PairObjective.model_validate({"name": name, "data": {"source": source, **changes}})


def test_no_objective_trains_on_what_another_holds_out(tmp_path: Path) -> None:
    both = {"chosen": "yes", "rejected": "no"}
    source = write(tmp_path / "a.jsonl", [{"prompt": f"question {i}", **both} for i in range(40)])
    other = write(tmp_path / "b.jsonl", [{"prompt": f"question {i}", **both} for i in range(20, 60)])
    objectives = [
        objective("one", source, heldout_fraction=0.25),
        objective("two", other, heldout_fraction=0.5),
    ]
    train, heldout = load_objectives(objectives, seed=3)
    assert [len(pairs) for pairs in heldout] == [10, 20]

    def asked(pairs: Sequence[Pair]) -> set[str]:
        return {pair.prompt[-1]["content"] for pair in pairs}

    held = asked([pair for pairs in heldout for pair in pairs])
    trained = [asked(pairs) for pairs in train]
    alone = [asked(load_pairs(o.data, 3)[0]) for o in objectives]
    assert alone[0] & held and trained == [prompts - held for prompts in alone]

    nested = [objective("one", source, heldout_fraction=0), objective("two", other, heldout_source=source)]
    with pytest.raises(ValueError, match=r"^objectives\.0\.data\.source: found '.*a\.jsonl', whose prompts"):
        load_objectives(nested, seed=3)
    absent = [objective("one", source), objective("two", str(tmp_path / "absent.jsonl"))]
    with pytest.raises(ValueError, match=r"^objectives\.1\.data\.source: file '.*absent\.jsonl' not found"):
        load_objectives(absent, seed=3)
