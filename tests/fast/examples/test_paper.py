"""examples/paper: one run for every row of the paper's Table 1, which differ in the method alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gapo_mega.commands.plan import make_plan
from gapo_mega.config import Config
from gapo_mega.config.loading import load
from gapo_mega.runs.preflight import preview
from tests.helpers.environment import ROOT

FOLDER = ROOT / "examples" / "paper"
NAMES = ["fast_rl", "gapo_p1", "gapo_p2", "mgda", "p_gapo", "ppo_h", "ppo_s", "safe_rlhf"]


@pytest.fixture(params=NAMES)
def config(request: pytest.FixtureRequest) -> Config:
    return load(FOLDER / f"{request.param}.yaml")


def test_every_row_of_the_table_has_a_file() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == NAMES


def test_a_dry_run_needs_no_network_and_no_model(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines = make_plan(config, 8).lines()
    assert sum("the packaged card" in line for line in lines) == 3
    assert "layout: 8 processes = tensor 4 x pipeline 1 x data 2" in lines
    assert all("not checked" in line for line in preview(config, shapes_only=True))


def test_hyper_parameters_are_those_of_table_2(config: Config) -> None:
    rollout, optimizer, critic = config.rollout, config.optimizer, config.critic.optimizer
    assert (rollout.temperature, rollout.top_p, rollout.repetition_penalty) == (0.7, 1.0, 1.05)
    assert config.longest == 512
    assert (config.micro_batch_size, rollout.prompts_per_step, rollout.samples_per_prompt) == (16, 1024, 1)
    assert (optimizer.lr, critic.lr, config.critic.heads) == (1e-6, 5e-7, "separate")
    for each in (optimizer, critic):
        assert (each.weight_decay, each.schedule, each.warmup_fraction) == (0.0, "cosine", 0.03)
    algorithm = config.algorithm
    assert (algorithm.kl_beta, config.loss.name, config.loss.options) == (0.05, "ppo", {"clip_epsilon": 0.1})
    assert (algorithm.ppo_epochs, algorithm.minibatches, algorithm.value_clip) == (1, 1, 5.0)
    assert (config.advantages.name, config.advantages.options) == ("gae", {"gamma": 1.0, "lam": 0.95})
    assert [(o.name, o.clip) for o in config.objectives] == [("helpful", 50.0), ("harmless", 50.0)]
    assert [o.options["model"] for o in config.objectives] == [
        "PKU-Alignment/beaver-7b-v1.0-reward",
        "PKU-Alignment/beaver-7b-v1.0-cost",
    ]


def test_runs_differ_in_the_method_alone(config: Config) -> None:
    method = ("output_dir", "aggregation", "scalarization")

    def rest(of: Config) -> dict[str, Any]:
        return {key: value for key, value in of.model_dump().items() if key not in method}

    assert rest(config) == rest(load(FOLDER / "gapo_p1.yaml"))
    assert config.output_dir.startswith("runs/paper/")


def test_the_example_of_the_paper_is_its_row_for_p_1() -> None:
    """Apart from the prompt template, which it has in itself."""
    mine, other = (
        load(file).model_dump()
        for file in (FOLDER / "gapo_p1.yaml", ROOT / "examples" / "gapo_mistral7b.yaml")
    )
    for each in (mine, other):
        each.pop("output_dir")
        for objective in each["objectives"]:
            objective["options"].pop("chat_template")
    assert mine == other
