"""A plan on a machine that is not the one of the run."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from gapo_mega import optional
from gapo_mega.commands.plan import make_plan
from gapo_mega.config import Config
from gapo_mega.runs.preflight import resolve
from tests.helpers.tiny import tiny_llama


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where no optional package is installed."""

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    probes = (optional.einops, optional.wandb, optional.mlflow, optional.trackio, optional.tensorboard)
    monkeypatch.setattr(optional, "version", version)
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


def configuration(folder: Path, **sections: Any) -> Config:
    tiny_llama(folder / "policy")
    base: dict[str, Any] = {
        "output_dir": "unused",
        "model": {"path": str(folder / "policy")},
        "data": {"source": "unused", "max_prompt_tokens": 20},
        "objectives": [{"name": "plain", "function": "gapo_mega.demo.rewards:plain"}],
        "logging": {"tensorboard": False},
    }
    return Config.model_validate(base | sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"parallel": {"distributed_optimizer_instances": 2}},
            "^parallel.distributed_optimizer_instances: found 2 without the package einops",
        ),
        ({"logging": {"tensorboard": True}}, "^logging.tensorboard: found true, but tensorboard is not inst"),
        ({"logging": {"tensorboard": False, "wandb": True}}, "^logging.wandb: found true, but wandb is not"),
        (
            {"logging": {"tensorboard": False, "loggers": [{"name": "mlflow"}]}},
            "^logging.loggers: found mlflow, but mlflow is not installed",
        ),
        (
            {"rollout": {"backend": "vllm", "vllm": {"python": "/no/python"}}},
            "^rollout.vllm.python: file /no/python not found",
        ),
    ],
)
def test_it_needs_nothing_that_only_the_run_needs(
    tmp_path: Path, bare: None, sections: dict[str, Any], message: str
) -> None:
    run = configuration(tmp_path, **sections)
    assert make_plan(run, 2).memory.peak > 0
    with pytest.raises(ValueError, match=message):
        resolve(run, 2)


def test_names_of_loggers_are_still_checked(tmp_path: Path, bare: None) -> None:
    run = configuration(tmp_path, logging={"loggers": [{"name": "wandv"}]})
    with pytest.raises(ValueError, match=r"^logging\.loggers\.0\.name: found 'wandv' \(did you mean"):
        make_plan(run, 2)
