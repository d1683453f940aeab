"""What is drawn: the same for a seed, and in time everything."""

from __future__ import annotations

from tests.helpers.kills.cases import LAYOUTS, SIGNALS, TARGETS, Case, draw
from tests.helpers.kills.phases import BY_NAME, first

ALL = tuple(LAYOUTS)


def cases(count: int, seed: int = 1, layouts: tuple[str, ...] = ALL) -> list[Case]:
    return [draw(seed, number, layouts, "forked") for number in range(count)]


def test_a_seed_gives_the_same_cases() -> None:
    assert cases(20) == cases(20)
    assert cases(20) != cases(20, seed=2)


def test_every_signal_meets_every_phase_early() -> None:
    phases = first(background=True)
    firsts = [case.kills[0] for case in cases(len(phases) * len(SIGNALS))]
    assert {(kill.phase, kill.signal) for kill in firsts} == {(p, s) for p in phases for s in SIGNALS}


def test_phases_of_background_writing_are_of_runs_that_do_it() -> None:
    drawn = {"background write": set(), "background index": set()}
    for case in cases(400):
        for kill in case.kills:
            if kill.phase in drawn:
                drawn[kill.phase].add(case.layout)
    assert set(map(frozenset, drawn.values())) == {frozenset({"alone-background", "2-background"})}
    others = cases(400, layouts=("alone", "2"))
    assert not {kill.phase for case in others for kill in case.kills} & drawn.keys()


def test_everything_else_is_met_in_time() -> None:
    found = cases(400)
    kills = [kill for case in found for kill in case.kills]
    assert {case.layout for case in found} == set(ALL)
    assert {len(case.kills) for case in found} == {1, 2}
    assert {kill.target for kill in kills} == set(TARGETS)
    assert {kill.told for kill in kills} == {*SIGNALS, *(f"{signal} twice" for signal in SIGNALS[1:])}
    assert {case.kills[1].phase for case in found if len(case.kills) > 1} >= {"resume", "export"}


def test_who_is_hit_is_there() -> None:
    for case in cases(200):
        layout = LAYOUTS[case.layout]
        for kill in case.kills:
            assert kill.victim < layout.ranks and kill.observed < layout.ranks
            assert kill.observed == 0 or not BY_NAME[kill.phase].main_only
            assert layout.nproc or kill.target == "rank"
