"""What the observer counts, of functions of this file."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from tests.helpers.kills.observer import COUNTS, VARIABLE, Observer, begin, ranks_file

HERE = "/" + Path(__file__).name
PLACES = {"outer": {HERE: "outer"}, "inner": {HERE: "inner"}, "fails": {HERE: "outer"}}


def leaf() -> None:
    return None


def inner() -> None:
    leaf()


def outer(times: int) -> None:
    for _ in range(times):
        inner()
    leaf()


def fails() -> None:
    leaf()
    raise ValueError


@pytest.fixture
def observer(tmp_path: Path) -> Observer:
    return Observer({"places": PLACES, "folder": str(tmp_path)})


def test_events_belong_to_the_innermost_phase(observer: Observer) -> None:
    observer.start()
    try:
        outer(2)
        leaf()  # in no phase
        outer(0)
    finally:
        sys.setprofile(None)
    # A call and a return each, of the function itself and of ``leaf``.
    assert observer.counts == {"outer": [4, 4], "inner": [4, 4]}


def test_a_phase_ends_with_an_error(observer: Observer) -> None:
    observer.start()
    try:
        for _ in range(2):
            with pytest.raises(ValueError):
                fails()
    finally:
        sys.setprofile(None)
    assert len(observer.counts["outer"]) == 2


def test_a_function_of_that_name_elsewhere_is_no_phase(tmp_path: Path) -> None:
    observer = Observer({"places": {"leaf": {"/elsewhere.py": "outer"}}, "folder": str(tmp_path)})
    observer.start()
    try:
        leaf()
    finally:
        sys.setprofile(None)
    assert observer.counts == {}


def test_a_timed_phase_is_milliseconds(tmp_path: Path) -> None:
    observer = Observer({"places": PLACES, "folder": str(tmp_path), "timed": ["outer"]})
    observer.start()
    outer(3)
    assert sys.getprofile() is None
    observer.tell()
    counts = json.loads((tmp_path / COUNTS).read_text())
    assert list(counts) == ["outer"] and counts["outer"][0] >= 0


def test_a_threaded_phase_is_one_of_other_threads(tmp_path: Path) -> None:
    """And the main thread's phases are its own, whatever others call."""
    observer = Observer({"places": PLACES, "folder": str(tmp_path), "threaded": ["inner"]})
    observer.start()
    try:
        inner()
        other = threading.Thread(target=outer, args=(2,))
        other.start()
        other.join()
        outer(0)
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    assert observer.counts == {"inner": [4, 4], "outer": [4]}


@pytest.mark.parametrize(
    ("launched", "environment", "told"),
    [(True, {}, None), (False, {}, 0), (True, {"RANK": "1"}, 1)],
)
def test_every_rank_tells_its_process(
    tmp_path: Path, launched: bool, environment: dict[str, str], told: int | None
) -> None:
    """But not the launcher; and of ranks that are not observed, nothing else happens."""
    plan = {"folder": str(tmp_path), "launched": launched, "observed": -1}
    begin({VARIABLE: json.dumps(plan), **environment})
    assert sys.getprofile() is None
    assert [path.name for path in tmp_path.iterdir()] == ([] if told is None else [ranks_file(told)])
    begin({})
