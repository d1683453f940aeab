"""Which back ends there are, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import Config
from gapo_mega.rollout.backends import RolloutBackend, backends, check, find
from tests.helpers.fake_runs import configuration


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({}, "rollout.vllm: found neither of python and url"),
        ({"vllm": {"python": "/bin/sh", "url": "http://localhost:1"}}, "rollout.vllm: found both of python"),
        ({"vllm": {"url": "http://other:1"}}, "rollout.vllm.weights_directory: found none with .*other:1"),
        (
            {"vllm": {"url": "http://[::1]:1"}, "top_p": 0.9},
            "rollout.top_p: found 0.9 with .*accepted: 1, or a",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, rollout: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        find("vllm").check(configuration(tmp_path, rollout=rollout))


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://u:p@host:1", "http://host:1/?a=b", []])
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: Any) -> None:
    with pytest.raises(ValueError, match="url"):
        configuration(tmp_path, rollout={"vllm": {"url": url}})


def test_its_python_has_to_be_where_the_run_is(tmp_path: Path) -> None:
    config = configuration(tmp_path, rollout={"vllm": {"python": "/no/python"}})
    find("vllm").check(config)
    with pytest.raises(ValueError, match=r"^rollout.vllm.python: file /no/python not found"):
        find("vllm").check_here(config)


def test_a_server_of_one_machine_serves_no_job_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, rollout={"vllm": {"python": "/bin/sh"}})
    find("vllm").check_here(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    find("vllm").check_here(config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in a job of 4 processes, 2 of them on this machine; accepted"):
        find("vllm").check_here(config)


def test_a_class_of_one_s_own_has_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from gapo_mega.rollout.backends import RolloutBackend\n"
        "class Base(RolloutBackend):\n"
        "    def update_weights(self): ...\n"
        "    def generate(self, prompts, sampling, seed): ...\n"
        "class Says(Base):\n    answers_beside = True\n"
        "class Has(Says):\n    def ask(self, prompts, sampling, seed): ...\n"
        "class Asks(Base):\n    def ask(self, prompts, sampling, seed): ...\n"
    )

    def checked(name: str, ahead: int) -> None:
        check(configuration(tmp_path, rollout={"ahead": ahead, "backend": f"{tmp_path / 'own.py'}:{name}"}))

    checked("Has", 1)
    checked("Base", 0)
    with pytest.raises(ValueError, match=r"^rollout.ahead: found 1 with rollout.backend .*own.py:Base"):
        checked("Base", 1)
    with pytest.raises(ValueError, match=r"^rollout.backend: found .*own.py:Says, which .* no method ask"):
        checked("Says", 0)
    with pytest.raises(ValueError, match=r"^rollout.backend: found .*own.py:Asks, which .* not answers_besi"):
        checked("Asks", 0)


def test_replicas_are_of_a_python_and_share_lists_of_variables(tmp_path: Path) -> None:
    def options(**given: Any) -> Config:
        return configuration(tmp_path, rollout={"vllm": given})

    environment = {"A": "same", "B": ["0,1", "2,3"]}
    found = options(python="/bin/sh", replicas=2, environment=environment).rollout.vllm
    assert [found.environment_of(i) for i in range(2)] == [{"A": "same", "B": b} for b in ("0,1", "2,3")]
    with pytest.raises(ValueError, match=r"rollout.vllm.environment.B: found 2 values, .*the 3 replicas"):
        options(python="/bin/sh", replicas=3, environment=environment)
    with pytest.raises(ValueError, match=r"rollout.vllm.replicas: found 2 without rollout.vllm.python"):
        options(url="http://localhost:1", replicas=2)


def test_ahead_takes_a_back_end_of_its_own_processes(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^rollout.ahead: found 1 with rollout.backend megatron, accepted: 0"
    ):
        check(configuration(tmp_path, rollout={"ahead": 1}))
    check(configuration(tmp_path, rollout={"ahead": 0}))
    check(configuration(tmp_path, rollout={"ahead": 2, "backend": "vllm", "vllm": {"url": "http://[::1]:1"}}))
    with pytest.raises(ValueError, match="ahead"):
        configuration(tmp_path, rollout={"ahead": -1})


def test_every_back_end_of_the_folder_is_found_by_its_name() -> None:
    assert backends().keys() == {"megatron", "vllm"}
    assert all(issubclass(backend, RolloutBackend) for backend in backends().values())
    with pytest.raises(ValueError, match=r"rollout.backend: found 'vlm' \(did you mean 'vllm'\?\), accepted"):
        find("vlm")
