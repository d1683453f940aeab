"""Rollouts drawn ahead by a small server over a real socket: which policy draws what, and ways out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.objectives.base import RewardFailed
from gapo_mega.rollout import ahead as ahead_module
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.runs.trainer import Trainer
from tests.helpers.ahead_runs import PATIENCE, STEPS, built, lines
from tests.helpers.fake_engine import terminate
from tests.helpers.fake_runs import HELD_OUT, Words
from tests.helpers.metrics_log import metrics
from tests.helpers.table_policy import TablePolicy
from tests.helpers.vllm_protocol import TableServer, table_server


@pytest.fixture
def server() -> Iterator[TableServer]:
    with table_server() as running:
        yield running


def staleness(directory: Path) -> list[float]:
    return [line["rollout/staleness"] for line in metrics(directory)]


def version(label: str) -> int:
    """Updates that weights of this label had seen."""
    return int(label.split("-")[1])


def policies(run: Trainer, server: TableServer, steps: int = STEPS) -> list[set[int]]:
    """By step: versions of the weights that its responses were drawn with, as the server says.

    Steps of two epochs may share prompts: the earlier one is asked for first.
    """
    remaining = [(version(label), prompt) for label, prompt, _ in server.asked if prompt not in held_out()]
    found: list[set[int]] = []
    for step in range(steps):
        own = {run.prompts[i].token_ids for i in run.order.items(step)}
        mine = [pair for pair in remaining if pair[1] in own][: 2 * len(own)]
        found.append({number for number, _ in mine})
        for pair in mine:
            remaining.remove(pair)
    return found


def held_out() -> set[tuple[int, ...]]:
    return {prompt.token_ids for prompt in HELD_OUT}


# -- which policy draws what -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "expected"), [(1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 0, 2]), (3, [0, 0, 0, 0, 0]), (9, [0] * 5)]
)
def test_a_step_s_responses_are_of_the_policy_that_its_number_says(
    tmp_path: Path, server: TableServer, ahead: int, expected: list[int]
) -> None:
    run = built(tmp_path, server.url, ahead=ahead)
    assert run.run()
    assert policies(run, server) == [{number} for number in expected]
    assert staleness(tmp_path) == [step - number for step, number in enumerate(expected)]
    assert server.generated == len(HELD_OUT) + STEPS * 8


def test_without_ahead_every_step_is_of_its_own_policy(tmp_path: Path, server: TableServer) -> None:
    run = built(tmp_path, server.url, ahead=0)
    assert run.run()
    assert policies(run, server) == [{step} for step in range(STEPS)]
    assert not any(name.startswith("rollout/") for name in metrics(tmp_path)[0])


@pytest.mark.parametrize("ahead", [1, 2])
def test_responses_are_drawn_while_the_policy_is_trained(
    tmp_path: Path, server: TableServer, ahead: int
) -> None:
    """The server answers the next group only once an update is under way, which waits for those answers."""
    training, drawn = threading.Event(), threading.Event()
    before = len(HELD_OUT) + 8 * ahead

    def when_training(path: str, content: Any) -> None:
        if "generate" in path and server.generated >= before:
            assert training.wait(PATIENCE)

    def train() -> None:
        training.set()
        for _ in range(int(PATIENCE / 0.02)):
            if server.generated == before + 8 * ahead:
                drawn.set()
                return
            threading.Event().wait(0.02)

    server.fail = when_training  # type: ignore[assignment]
    engine = TablePolicy()
    engine.at = {("update_policy", 1): train}
    assert built(tmp_path, server.url, engine, ahead=ahead).run()
    assert drawn.is_set()


def test_the_same_run_twice_is_the_same(tmp_path: Path, server: TableServer) -> None:
    server.seconds_per_token = 0.002
    for name in ("one", "two"):
        assert built(tmp_path / name, server.url).run()
        server.seconds_per_token = 0.0
    assert lines(tmp_path / "one") == lines(tmp_path / "two")


def test_tokens_are_corrected_unless_somebody_says_otherwise(tmp_path: Path, server: TableServer) -> None:
    assert built(tmp_path / "auto", server.url).run()
    assert all(0 < line["correction/weight"] <= 2 for line in metrics(tmp_path / "auto"))
    assert built(tmp_path / "none", server.url, algorithm={"correction": "none"}).run()
    assert "correction/weight" not in metrics(tmp_path / "none")[0]


def test_held_out_answers_in_between_are_of_the_policy_as_it_is_and_change_nothing(
    tmp_path: Path, server: TableServer
) -> None:
    assert built(tmp_path / "plain", server.url).run()
    plain = len(server.asked)
    run = built(tmp_path / "evaluated", server.url, evaluation={"every_steps": 1, "shown": 1})
    assert run.run()
    extra = {"heldout", "heldout_gain", "heldout_gain_error"}
    kept = [
        {k: v for k, v in line.items() if k.split("/")[0] not in extra}
        for line in lines(tmp_path / "evaluated")
    ]
    assert kept == lines(tmp_path / "plain")
    of_held_out = [label for label, prompt, _ in server.asked[plain:] if prompt in held_out()]
    assert [int(label.split("-")[1]) for label in of_held_out] == [
        n for n in range(STEPS + 1) for _ in HELD_OUT
    ]


def test_greedy_responses_for_the_estimator_are_drawn_ahead_too(tmp_path: Path, server: TableServer) -> None:
    run = built(tmp_path, server.url, advantages={"name": "remax"})
    assert run.run()
    greedy = [version(label) for label, _, sampling in server.asked if sampling["temperature"] == 0]
    assert greedy == [number for number in (0, 0, 1, 2, 3) for _ in range(4)]


# -- interrupted and resumed -----------------------------------------------------------------------------


def assert_resumed_as_undisturbed(tmp_path: Path, server: TableServer, ahead: int) -> None:
    last = TablePolicy()
    assert built(tmp_path / "run", server.url, last, ahead=ahead).run()
    whole = TablePolicy()
    with table_server() as other:
        assert built(tmp_path / "whole", other.url, whole, ahead=ahead).run()
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert last.policy == whole.policy and last.table.equal(whole.table)


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_signal_s_checkpoint_has_what_was_drawn_ahead(
    tmp_path: Path, server: TableServer, ahead: int, step: int
) -> None:
    engine = TablePolicy()
    engine.at = {("update_policy", step): terminate}
    server.seconds_per_token = 0.002  # under way when the signal comes
    assert not built(tmp_path / "run", server.url, engine, ahead=ahead).run()
    assert_resumed_as_undisturbed(tmp_path, server, ahead)


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, server: TableServer, ahead: int, step: int
) -> None:
    def die() -> None:
        raise KeyboardInterrupt  # writes no checkpoint

    engine = TablePolicy()
    engine.at = {("update_policy", step): die}
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "run", server.url, engine, ahead=ahead, checkpoint={"every_steps": 1}).run()
    assert_resumed_as_undisturbed(tmp_path, server, ahead)


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_step_that_fails_after_its_rollout_leaves_that_rollout(
    tmp_path: Path, server: TableServer, ahead: int
) -> None:
    failing = Words("long")
    engine = TablePolicy()

    def fail() -> None:
        failing.fail = KeyError("gone")

    engine.at = {("update_policy", 2): fail}
    with pytest.raises(RewardFailed):
        built(
            tmp_path / "run", server.url, engine, ahead=ahead, objectives=[failing, Words("short", -1.0)]
        ).run()
    assert_resumed_as_undisturbed(tmp_path, server, ahead)


def stopped_while_waiting(directory: Path, server: TableServer, ahead: int) -> None:
    """The signal comes while the third step waits for its responses, which come half a second later."""
    released = threading.Event()
    first = len(HELD_OUT) + 8 * 2

    def hold(path: str, content: Any) -> None:
        if "generate" in path and server.generated >= first and not released.is_set():
            if server.generated == first:
                threading.Timer(0.5, terminate).start()
                threading.Timer(1.0, released.set).start()
            assert released.wait(PATIENCE)

    server.fail = hold  # type: ignore[assignment]
    assert not built(directory, server.url, ahead=ahead).run()


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_signal_while_a_step_waits_for_its_responses(
    tmp_path: Path, server: TableServer, ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_while_waiting(tmp_path / "run", server, ahead)
    assert "stopped by a signal while waiting in step 3" in caplog.text
    assert_resumed_as_undisturbed(tmp_path, server, ahead)


def test_a_signal_while_a_server_hangs(
    tmp_path: Path, server: TableServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint does not wait for it as long as requests may take."""
    monkeypatch.setattr(ahead_module, "_SLACK", 0.5)
    monkeypatch.setattr(ahead_module, "_SILENT", 0.1)
    never = threading.Event()

    def hold(path: str, content: Any) -> None:
        if "generate" in path and server.generated >= len(HELD_OUT) + 8 * 2:
            never.wait(PATIENCE)

    server.fail = hold  # type: ignore[assignment]
    engine = TablePolicy()
    engine.at = {("update_policy", 2): terminate}
    started = time.monotonic()
    assert not built(tmp_path, server.url, engine).run()
    assert time.monotonic() - started < PATIENCE, "requests end after that time, or never"
    assert "a checkpoint waits for the responses of step 3, drawn ahead, until " in caplog.text
    assert "the responses of step 3, drawn ahead, did not come (not within " in caplog.text
    never.set()
    server.fail = lambda path, content: None
    assert built(tmp_path, server.url).run()
    assert staleness(tmp_path) == [0, 1, 0, 1, 1]


def test_more_or_fewer_steps_ahead_after_a_resume(tmp_path: Path, server: TableServer) -> None:
    directory = tmp_path / "run"
    for number, ahead in enumerate((2, 1, 0, 3)):
        engine = TablePolicy()
        engine.at = {("update_policy", 1): terminate}
        assert built(directory, server.url, engine, ahead=ahead).run() is False, number
    assert built(directory, server.url, ahead=1).run()
    assert len(metrics(directory)) == STEPS


def test_another_number_of_data_ranks_draws_anew(
    tmp_path: Path, server: TableServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = TablePolicy()
    engine.at = {("update_policy", 2): terminate}
    run = built(tmp_path, server.url, engine)
    assert not run.run()
    assert run._ahead is not None
    state = run._ahead.state_dict(2)
    assert list(state["batches"]) == ["2"]
    again = built(tmp_path / "other", server.url)
    assert again._ahead is not None
    again._ahead.load_state_dict({**state, "data_ranks": 2})
    assert again._ahead._batches == {}
    assert "drawn ahead for 2 data-parallel ranks; they are drawn anew" in caplog.text


# -- what goes wrong -------------------------------------------------------------------------------------


def failing(server: TableServer, when: Callable[[], bool]) -> Callable[[str, Any], tuple[int, Any] | None]:
    return lambda path, content: (500, {"error": "engine is dead"}) if "generate" in path and when() else None


def test_what_is_lost_under_way_is_drawn_by_the_policy_as_it_is(
    tmp_path: Path, server: TableServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail = failing(server, lambda: server.generated == len(HELD_OUT) + 8 * 2 and not again)
    again: list[str] = []
    engine = TablePolicy()
    engine.at = {("update_policy", 2): lambda: again.append("restarted")}
    assert built(tmp_path, server.url, engine).run()
    assert staleness(tmp_path) == [0, 1, 0, 1, 1]
    assert 'found status 500 and \'{"error": "engine is dead"}\'; the weights are taken' in caplog.text


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(
    tmp_path: Path, server: TableServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = TablePolicy()
    engine.at = {("update_policy", 2): server.close}
    with pytest.raises(ServerLost, match=rf"^{server.url}: found no healthy vLLM server within 2 s$"):
        built(tmp_path, server.url, engine).run()
    assert (tmp_path / "checkpoints" / "step_00000002" / "complete.json").exists()
    assert "the run can go on from step 2" in caplog.text
    with table_server() as other:
        assert built(tmp_path, other.url).run()
    assert staleness(tmp_path)[:2] == [0, 1] and len(metrics(tmp_path)) == STEPS


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_refusal_under_way_is_the_error_of_the_run(tmp_path: Path, server: TableServer, ahead: int) -> None:
    before = len(HELD_OUT) + 8 * ahead
    server.fail = lambda path, content: (
        (400, {"error": "too long"}) if "generate" in path and server.generated >= before else None
    )
    with pytest.raises(ValueError, match=rf"^{server.url}.*found status 400 and .*too long"):
        built(tmp_path, server.url, ahead=ahead).run()


def test_an_early_end_waits_for_nothing_that_nobody_wants(tmp_path: Path, server: TableServer) -> None:
    """Responses of a step that does not come never come here."""
    run = built(tmp_path, server.url)
    never = threading.Event()
    stop = len(HELD_OUT) + 8 * 3

    def hold(path: str, content: Any) -> None:
        if "generate" in path and server.generated >= stop and not never.is_set():
            never.wait(PATIENCE)

    server.fail = hold  # type: ignore[assignment]
    assert run._ahead is not None
    for step in range(2):
        run._ahead.take(step)
    run._ahead.drop()
    run._ahead.settle()
    never.set()
