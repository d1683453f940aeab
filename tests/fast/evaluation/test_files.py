"""Who may read what a run writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gapo_mega.config.loading import dump
from gapo_mega.evaluation.files import partial_of, write_data, write_text
from tests.helpers.fake_runs import configuration


@pytest.fixture(autouse=True)
def open_to_all() -> Iterator[None]:
    """A umask that keeps nothing from others."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_may_repeat_the_configuration_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("new", "again"):
        write_text(path, text)
        assert (path.read_text(), mode(path)) == (text, 0o600)
        path.chmod(0o644)
    dump(configuration(tmp_path), tmp_path / "dumped.yaml")
    assert mode(tmp_path / "dumped.yaml") == 0o600


def test_it_is_at_no_moment_open_to_others(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    partial_of(path).write_text("")  # a killed process left it, and somebody has opened it
    with partial_of(path).open() as theirs:
        write_text(path, "secret")
        assert theirs.read() == ""
    assert [found.name for found in tmp_path.iterdir()] == ["config.yaml"]


def test_numbers_and_texts_of_the_run_are_as_the_umask_has_it(tmp_path: Path) -> None:
    write_data(tmp_path / "metrics.jsonl", "{}\n")
    assert mode(tmp_path / "metrics.jsonl") == 0o666
