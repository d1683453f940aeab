"""What of earlier work still counts, whatever happened in between."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gapo_mega.evaluation.answers import Answer, read_answers, write_answers
from gapo_mega.runs import answer_store
from gapo_mega.runs.answer_store import EARLIER, SETTINGS_FILE, AnswerStore, Belonging
from tests.helpers.answers import answers

GENERATION = {"weights": "a", "seed": 1}
KIND, SHORT = {"kind": {"function": "f"}}, {"short": {"function": "g"}}
GIVEN = answers([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], samples=2)


def opened(
    folder: Path, objectives: dict[str, object], overwrite: bool = False, **changes: object
) -> AnswerStore:
    store = AnswerStore(folder, Belonging({**GENERATION, **changes}, objectives), 2)
    store.open(overwrite)
    return store


def scored(given: Sequence[Answer], **scores: float) -> list[Answer]:
    return [replace(answer, scores={**answer.scores, **scores}) for answer in given]


def lines(folder: Path) -> list[Answer]:
    return read_answers(folder / "responses.jsonl")


def test_it_goes_on_behind_the_last_whole_prompt(tmp_path: Path) -> None:
    opened(tmp_path / "m", KIND).add(GIVEN[:4])
    path = tmp_path / "m" / "responses.jsonl"
    path.write_bytes(path.read_bytes()[:-10])  # killed while it wrote
    store = opened(tmp_path / "m", KIND)
    assert store.done == 1 and store.earlier(1) is None
    store.add(GIVEN[2:])
    assert store.close() == GIVEN
    assert opened(tmp_path / "m", KIND).done == 3


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    opened(tmp_path / "m", KIND).add(GIVEN)
    with pytest.raises(ValueError, match=r"^--out: found .*m, whose responses have seed 1, here it is 2; "):
        opened(tmp_path / "m", KIND, seed=2)
    with pytest.raises(ValueError, match=r"have top_k null, here it is 5"):
        opened(tmp_path / "m", KIND, top_k=5)
    assert lines(tmp_path / "m") == GIVEN
    assert opened(tmp_path / "m", KIND, seed=2, overwrite=True).done == 0
    assert lines(tmp_path / "m") == []


def test_somebody_else_s_responses_are_refused(tmp_path: Path) -> None:
    opened(tmp_path / "m", KIND).add(GIVEN)
    (tmp_path / "m" / SETTINGS_FILE).unlink()
    with pytest.raises(ValueError, match=rf"responses.jsonl without {SETTINGS_FILE} beside it"):
        opened(tmp_path / "m", KIND)
    (tmp_path / "m" / SETTINGS_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"settings.json, which is not as an evaluation writes it"):
        opened(tmp_path / "m", KIND)


def test_a_new_objective_takes_the_responses_that_are_there(tmp_path: Path) -> None:
    opened(tmp_path / "m", KIND).add(GIVEN)
    store = opened(tmp_path / "m", KIND | SHORT)
    assert store.done == 0
    assert [store.earlier(number) for number in range(3)] == [GIVEN[:2], GIVEN[2:4], GIVEN[4:]]
    store.add(scored(GIVEN[:2], short=0.0))
    store = opened(tmp_path / "m", KIND | SHORT)  # killed, and started again
    assert store.done == 1 and store.earlier(2) == GIVEN[4:]
    store.add(scored(GIVEN[2:], short=0.0))
    assert store.close() == scored(GIVEN, short=0.0)
    assert not (tmp_path / "m" / EARLIER).exists()


def test_a_changed_objective_loses_its_scores_alone(tmp_path: Path) -> None:
    both = scored(GIVEN, short=9.0)
    opened(tmp_path / "m", KIND | SHORT).add(both)
    store = opened(tmp_path / "m", KIND | {"short": {"function": "other"}})
    assert store.earlier(0) == GIVEN[:2]
    # Killed at once: the new settings are there, and no score of the old ones may count again.
    store = opened(tmp_path / "m", KIND | {"short": {"function": "other"}})
    assert store.done == 0 and store.earlier(0) == GIVEN[:2]


def test_an_objective_that_is_left_out_keeps_its_scores(tmp_path: Path) -> None:
    both = scored(GIVEN, short=9.0)
    opened(tmp_path / "m", KIND | SHORT).add(both)
    assert opened(tmp_path / "m", KIND).done == 3
    assert opened(tmp_path / "m", KIND | SHORT).done == 3
    # What was answered in the meantime has none of it.
    shutil.rmtree(tmp_path / "m")
    opened(tmp_path / "m", KIND | SHORT).add(both[:2])
    opened(tmp_path / "m", KIND).add(GIVEN[2:])
    store = opened(tmp_path / "m", KIND | SHORT)
    assert store.done == 0 and store.earlier(0) == both[:2] and store.earlier(1) == GIVEN[2:4]


def test_it_may_be_killed_between_any_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of setting aside what lacks a score: after the copy, and after the removal."""

    class Killed(Exception):
        pass

    def killed_after_the_copy(path: Path, rows: Sequence[Answer]) -> None:
        write_answers(path, rows)
        raise Killed

    def killed(*_: object) -> None:
        raise Killed

    changed = KIND | {"short": {"function": "other"}}
    for name, fatal in (("write_answers", killed_after_the_copy), ("write_text", killed)):
        folder = tmp_path / name
        opened(folder, KIND | SHORT).add(scored(GIVEN, short=9.0))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(answer_store, name, fatal)
            opened(folder, changed)
        store = opened(folder, changed)
        assert store.done == 0
        assert [store.earlier(number) for number in range(3)] == [GIVEN[:2], GIVEN[2:4], GIVEN[4:]]
