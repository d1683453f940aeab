"""Where a process is: phases within phases, and after an error."""

from __future__ import annotations

import pytest

from gapo_mega.whereabouts import enter, here, passed, within


def test_phases_within_phases() -> None:
    enter("training", 3)
    with within("score"):
        assert str(here()) == "step 3, score"
        with within("reference"):
            assert str(here()) == "step 3, reference"
        assert str(here()) == "step 3, score"
    assert str(here()) == "step 3, training"
    enter("end of the run")
    assert str(here()) == "end of the run"


def test_an_error_leaves_the_process_where_it_is() -> None:
    enter("training", 2)
    with pytest.raises(KeyError), within("update"):
        passed("forward")
        passed("backward")
        raise KeyError
    assert str(here()) == "step 2, update after backward"


def test_a_phase_begins_when_it_is_entered() -> None:
    enter("training", 1)
    first = here().since
    with within("score"):
        assert here().since >= first
        inner = here().since
        passed("a lap")
        assert here().since >= inner
    assert here().since == first
