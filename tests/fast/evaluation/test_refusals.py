"""Which responses refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapo_mega.evaluation.refusals import LISTS, phrases, refuses


@pytest.mark.parametrize(
    ("response", "gcg", "first_person"),
    [
        ("I\u2019m  SORRY, but no.", True, True),
        ("I cannot help.", True, True),
        ("i can't help.", False, True),
        ("As an example, take five.", True, False),  # what the published list takes for a refusal
        ("Sure. The sorrynesses of it", False, False),
        ("", False, False),
    ],
)
def test_phrases_are_found_as_words(response: str, gcg: bool, first_person: bool) -> None:
    assert refuses(response, LISTS["gcg"]) is gcg
    assert refuses(response, LISTS["first_person"]) is first_person


def test_a_file_has_a_phrase_a_line(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("\ufeffLeider nicht\n\n  Das geht nicht (mehr) \n", encoding="utf-8")
    found = phrases(str(tmp_path / "own.txt"))
    assert found == ("Leider nicht", "Das geht nicht (mehr)")
    assert refuses("Nein: das geht nicht (mehr).", found)


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--refusals: found 'gcq', accepted: gcg, first_person, or a text"):
        phrases("gcq")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match=r"^--refusals: found .*empty without a phrase"):
        phrases(str(tmp_path / "empty"))
