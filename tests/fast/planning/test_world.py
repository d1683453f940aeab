"""The launcher's variables: what fits together, and what is told of the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gapo_mega.planning.world import World, other_launcher, read_world

MEETING = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        (MEETING, World()),  # many clusters set it for every job
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "NODE_RANK": "1"}, World()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World()),
        # Alone there is nobody to meet, wherever a launcher once let its processes meet.
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEETING}, World()),
        ({"RANK": "3", "WORLD_SIZE": "4", **MEETING}, World(3, 4, 0, "node7:29500")),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEETING},
            World(5, 8, 1, "node7:29500"),
        ),
    ],
)
def test_what_fits_together(environment: dict[str, str], world: World) -> None:
    assert read_world(environment, to_meet=True) == world
    assert read_world(environment) == replace(world, address=None)


def test_where_to_meet_is_asked_of_those_who_meet() -> None:
    """A dry run under a launcher's variables needs no address."""
    assert read_world({"RANK": "1", "WORLD_SIZE": "4"}) == World(1, 4)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "3"}, r"^RANK: found '3' without WORLD_SIZE, accepted: .*`unset RANK`\)$"),
        ({"WORLD_SIZE": "4"}, r"^WORLD_SIZE: found '4' without RANK, .*`unset WORLD_SIZE`"),
        ({"WORLD_SIZE": "1"}, r"^WORLD_SIZE: found '1' without RANK"),
        ({"WORLD_SIZE": ""}, r"^WORLD_SIZE: found '', accepted: a whole number"),
        ({"RANK": "", "WORLD_SIZE": ""}, r"^RANK: found '', .*`unset RANK WORLD_SIZE`"),
        ({"LOCAL_RANK": "1"}, r"^LOCAL_RANK: found '1' without RANK, .*`unset LOCAL_RANK`"),
        ({"LOCAL_WORLD_SIZE": "2"}, r"^LOCAL_WORLD_SIZE: found '2' without RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, r"^RANK: found 'x', accepted: a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, r"^RANK: found '-1', accepted: a whole number, 0 or more"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, r"^RANK: found '1.0'"),
        ({"RANK": " 1", "WORLD_SIZE": "2"}, r"^RANK: found ' 1'"),
        ({"RANK": "\u0663", "WORLD_SIZE": "4"}, r"^RANK: found"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, r"^RANK: found"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"^WORLD_SIZE: found 0, accepted: 1 to"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, r"^RANK: found 4 with WORLD_SIZE 4, accepted: 0 to 3"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, r"^RANK: found 1 with WORLD_SIZE 1"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", **MEETING},
            r"^LOCAL_RANK: found 2 with 2 processes here, accepted: 0 to 1",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", **MEETING},
            r"^LOCAL_WORLD_SIZE: found 4 with WORLD_SIZE 2, accepted: 1 to 2",
        ),
        ({"RANK": "1", "WORLD_SIZE": "4"}, r"^MASTER_ADDR: found None with WORLD_SIZE 4, accepted: the host"),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": ""}, r"^MASTER_ADDR: found ''"),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, r"^MASTER_PORT: found None"),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "70000"},
            r"^MASTER_PORT: found '70000' with WORLD_SIZE 4, accepted: 1 to 65535",
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "0"},
            r"^MASTER_PORT: found '0'",
        ),
    ],
)
def test_what_does_not_is_one_line_with_the_way_out(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_world(environment, to_meet=True)
    text = str(raised.value)
    assert "\n" not in text and "accepted: " in text and "torchrun" in text and "`unset " in text


def test_the_environment_is_read_where_no_other_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert read_world(to_meet=True) == World(1, 2, 0, "here:1")


def test_tasks_that_do_not_know_of_each_other_are_told() -> None:
    found = other_launcher({"SLURM_STEP_NUM_TASKS": "4"})
    assert found is not None and found.startswith("SLURM_STEP_NUM_TASKS is 4, and RANK is not set")
    for environment in ({"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "4"}, {}):
        assert other_launcher(environment) is None
    assert other_launcher({"SLURM_STEP_NUM_TASKS": "4", "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (World(0, 2), "rank 1"),
        (World(1, 2), "rank 0"),
        (World(0, 4), "ranks 1 to 3"),
        (World(3, 4), "rank 0 and 2 more"),
    ],
)
def test_whom_a_rank_waits_for(world: World, words: str) -> None:
    assert world.others == words
