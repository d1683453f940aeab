"""What a run's directory says about how far the run is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gapo_mega.config import Config
from gapo_mega.runs.directory import begin, end
from gapo_mega.runs.lock import DirectoryLock
from gapo_mega.runs.recorded_config import record_config
from gapo_mega.runs.start import wanted
from gapo_mega.runs.sweep_states import check_same, state_of
from gapo_mega.runs.sweep_tasks import Task


def config_of(directory: Path, **sections: object) -> Config:
    return Config.model_validate(
        {
            "output_dir": str(directory),
            "steps": 4,
            "model": {"path": "model"},
            "data": {"source": "package:prompts"},
            "objectives": [{"name": "plain", "function": "gapo_mega.demo.rewards:plain"}],
            **sections,
        }
    )


def begun(directory: Path) -> Config:
    config = config_of(directory)
    directory.mkdir(parents=True, exist_ok=True)
    begin(directory, wanted(config), overwrite=False)
    record_config(config, directory)
    return config


def checkpoint(directory: Path, step: int) -> None:
    folder = directory / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps({"step": step}))


def finish(directory: Path, steps: int = 4) -> None:
    (directory / "summary.json").write_text('{"objectives": {}, "seconds": 1.0}')
    end(directory, steps)


def test_from_nothing_to_the_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert state_of(run, 4).name == "new"
    begun(run)
    assert (state_of(run, 4).name, state_of(run, 4).checkpoint) == ("part", False)
    checkpoint(run, 2)
    assert (state_of(run, 4).name, state_of(run, 4).steps, state_of(run, 4).checkpoint) == ("part", 2, True)
    with DirectoryLock(run, "gapo-mega train"):
        assert state_of(run, 4).name == "running"
    finish(run)
    assert (state_of(run, 4).name, state_of(run, 4).steps) == ("finished", 4)


def test_killed_while_it_wrote_its_results_it_begins_anew(tmp_path: Path) -> None:
    """``train`` would take it for a run that has ended, and refuse it."""
    config = begun(tmp_path)
    (tmp_path / "summary.json").write_text('{"objectives": {}, "seconds": 1.0}')
    task = Task("a", "train", tmp_path / "base.yaml", ("seed=1",), tmp_path, config)
    assert task.state().name == "part"
    assert task.arguments(2)[:6] == [
        "train",
        "--config",
        str(tmp_path / "base.yaml"),
        "--nproc",
        "2",
        "--overwrite",
    ]
    checkpoint(tmp_path, 1)
    assert "--overwrite" not in task.arguments(None) and "--nproc" not in task.arguments(None)


def test_more_steps_than_a_run_has_made(tmp_path: Path) -> None:
    """They follow from its last checkpoint; without one the run stays, and is told apart."""
    begun(tmp_path)
    finish(tmp_path)
    assert state_of(tmp_path, 6).name == "finished"
    with pytest.raises(ValueError, match=r"^steps: found 6, but the run that has ended in .* had 4"):
        check_same(tmp_path, config_of(tmp_path, steps=6))
    checkpoint(tmp_path, 4)
    assert state_of(tmp_path, 6).name == "part"


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"seed": 9}, "seed"),
        ({"rollout": {"vllm": {"arguments": ["--quantization=fp8"]}}}, "rollout.vllm.arguments"),
        ({"optimizer": {"lr": 1e-3}}, "optimizer.lr"),
        ({"aggregation": {"name": "p_gapo"}}, "aggregation.name"),
        ({"scalarization": {"name": "gdpo"}}, "scalarization.name"),
    ],
)
def test_a_finished_run_of_other_settings(tmp_path: Path, sections: dict[str, object], key: str) -> None:
    begun(tmp_path)
    finish(tmp_path)
    with pytest.raises(ValueError) as error:
        check_same(tmp_path, config_of(tmp_path, **sections))
    assert str(error.value).startswith(f"{key}: found ") and "\n" not in str(error.value)


def test_settings_that_change_no_number_may_differ(tmp_path: Path) -> None:
    begun(tmp_path)
    finish(tmp_path)
    other = {"logging": {"tensorboard": False}, "checkpoint": {"every_steps": 3}, "evaluation": {"shown": 1}}
    check_same(tmp_path, config_of(tmp_path / "elsewhere", **other))
    waits = {"timeout_minutes": 5, "silence_minutes": 1, "phase_minutes": None}
    servers = {
        "url": ["http://a:1", "http://b:1"],
        "weights_directory": "/shared",
        "timeout": 60,
        "patience": 5,
    }
    check_same(tmp_path, config_of(tmp_path, parallel=waits, rollout={"vllm": servers}))
    own = {"python": "/vllm/python", "replicas": 2, "environment": {"A": "1"}, "start_timeout": 60}
    check_same(tmp_path, config_of(tmp_path, rollout={"vllm": {**own, "piece_mib": 3}}))


def test_one_that_stopped_early_has_ended(tmp_path: Path) -> None:
    """Its last step's checkpoint would let it go on, if it had not been asked for these steps already."""
    begun(tmp_path)
    checkpoint(tmp_path, 2)
    (tmp_path / "summary.json").write_text('{"objectives": {}, "seconds": 1.0}')
    end(tmp_path, 2, asked=4)
    assert (state_of(tmp_path, 4).name, state_of(tmp_path, 4).steps) == ("finished", 2)
    assert state_of(tmp_path, 9).name == "part", "more steps are another question"


def test_what_chooses_the_result_must_be_the_same(tmp_path: Path) -> None:
    evaluation = {"every_steps": 2}
    record_config(config_of(tmp_path), tmp_path)
    check_same(tmp_path, config_of(tmp_path, evaluation=evaluation))  # it only looks
    with pytest.raises(ValueError, match=r"^checkpoint\.best: found 'worst_gain', but the run .* had None"):
        check_same(tmp_path, config_of(tmp_path, evaluation=evaluation, checkpoint={"best": "worst_gain"}))
