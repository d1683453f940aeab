"""Real runs in this process: which data, models and settings a checkpoint is resumed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gapo_mega.config import Config
from gapo_mega.config.supervised import RewardModelConfig, SftConfig
from gapo_mega.runs.start import train
from gapo_mega.runs.supervised import RewardRun, SftRun
from tests.helpers.tiny import tiny_chat_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A folder with a model, prompts and pairs, and a run of each kind with a checkpoint of its last step."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_chat_model(folder / "model", smollm2)
    write(folder / "prompts.jsonl", [{"prompt": f"What is {i} plus {7 * i}?", "id": i} for i in range(20)])
    write(folder / "heldout.jsonl", [{"prompt": f"What is {i} minus {7 * i}?"} for i in range(4)])
    write(folder / "pairs.jsonl", [pair(i) for i in range(40)])
    train(training(folder))
    run_supervised(RewardRun(rewards(folder)))
    run_supervised(SftRun(chats(folder)))
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of it all."""
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    return copy


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(i: int) -> dict[str, str]:
    question = f"\n\nHuman: May I have {i} of them?\n\nAssistant:"
    return {"chosen": f"{question} yes of course, {i}", "rejected": f"{question} no never, {i}"}


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    return config


def training(folder: Path, **changes: Any) -> Config:
    config = {
        "output_dir": str(folder / "train"),
        "steps": 2,
        "micro_batch_size": 4,
        "model": {"path": str(folder / "model")},
        "data": {
            "source": str(folder / "prompts.jsonl"),
            "heldout_source": str(folder / "heldout.jsonl"),
            "max_prompt_tokens": 80,
            "system_prompt": "Hi.",
        },
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
        "objectives": [
            {"name": "short", "function": "tests.helpers.rewards:short"},
            {"name": "vowels", "function": "tests.helpers.rewards:vowels"},
        ],
        "checkpoint": {"save_final": True},
        "logging": {"tensorboard": False, "progress": False},
    }
    return Config.model_validate(merged(config, changes))


def supervised(folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    config = {
        "output_dir": str(folder / name),
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_steps": 2,
        "model": {"path": str(folder / "model"), "max_tokens": 100},
        "data": {"source": str(folder / "pairs.jsonl"), "heldout_fraction": 0.2},
        "checkpoint": {"save_final": True, "export_hf": False},
        "logging": {"tensorboard": False, "progress": False},
    }
    return merged(config, changes)


def rewards(folder: Path, **changes: Any) -> RewardModelConfig:
    return RewardModelConfig.model_validate(supervised(folder, "reward", changes))


def chats(folder: Path, **changes: Any) -> SftConfig:
    return SftConfig.model_validate(supervised(folder, "sft", changes))


def run_supervised(run: RewardRun | SftRun) -> None:
    try:
        run.run()
    finally:
        run.engine.close()


def start(kind: str, folder: Path, **changes: Any) -> None:
    if kind == "train":
        train(training(folder, **changes))
    elif kind == "reward":
        run_supervised(RewardRun(rewards(folder, **changes)))
    else:
        run_supervised(SftRun(chats(folder, **changes)))


def edit(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return apply


def other_template(folder: Path) -> None:
    path = folder / "model" / "chat_template.jinja"
    path.write_text("{# other words, the same text #}" + path.read_text())


def other_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


REFUSED = [
    ("train", edit("prompts.jsonl", lambda rows: rows[::-1]), "data.source: found other training rows"),
    ("train", edit("prompts.jsonl", lambda rows: rows[:-1]), "data.source: found other training rows"),
    ("train", edit("prompts.jsonl", lambda rows: [*rows[:-1], rows[-1].replace("plus", "plas")]),
     "data.source: found other training rows"),
    ("train", edit("heldout.jsonl", lambda rows: [rows[0].replace("minus", "times"), *rows[1:]]),
     "data.heldout_source: found other held-out rows"),
    ("train", other_template, "data.chat_template: found other chat template"),
    ("train", other_weights, "model.path: found other weights of the policy"),
    ("reward", edit("pairs.jsonl", lambda rows: [*rows[:-1], rows[-1].replace("never", "newer")]),
     "data.source: found other "),
    ("sft", edit("pairs.jsonl", lambda rows: [*rows[:-1], rows[-1].replace("course", "coarse")]),
     "data.source: found other "),
    ("sft", other_template, "model.chat_template: found other chat template"),
    ("reward", other_weights, "model.path: found other weights of the policy"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED)
def test_other_data_or_another_model_is_refused(
    folder: Path, kind: str, change: Callable[[Path], None], message: str
) -> None:
    """Under the same names. Every file of the run is as before."""
    change(folder)
    directory = folder / kind
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    more = {"steps": 3} if kind == "train" else {"max_steps": 3}
    with pytest.raises(ValueError) as caught:
        start(kind, folder, **more)
    line = str(caught.value)
    assert line.startswith(message), line
    assert "\n" not in line and "accepted: the same, another output_dir, or --overwrite" in line
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("sft", {"seed": 2}, "seed: found 2"),
        ("sft", {"batch_size": 8}, "batch_size: found 8"),
        ("sft", {"assistant_only": False}, "assistant_only: found False"),
        ("reward", {"center_rewards": 0.5}, "center_rewards: found 0.5"),
        ("reward", {"model": {"keep_layers": 2}}, "model.keep_layers: found 2"),
        (
            "reward",
            {"optimizer": {"schedule": "constant", "warmup_fraction": 0.0}},
            "optimizer.schedule: found constant",
        ),
        ("train", {"data": {"system_prompt": "Hello."}}, "data.system_prompt: found Hello."),
    ],
)
def test_other_settings_are_refused_by_name(
    base: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        start(kind, base, **changes)
    assert str(caught.value).startswith(message)


def test_another_command_is_refused(base: Path) -> None:
    with pytest.raises(
        ValueError, match="which gapo-mega sft has written; accepted for gapo-mega train-reward"
    ):
        run_supervised(RewardRun(rewards(base, output_dir=str(base / "sft"))))


@pytest.mark.parametrize("kind", ["train", "sft"])
def test_a_folder_that_moved_goes_on(folder: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Data, model and run lie elsewhere now: their contents are the same."""
    directory = folder / kind
    before = lines_of(directory)
    more = {"steps": 3} if kind == "train" else {"max_steps": 3}
    start(kind, folder, optimizer={"lr": 1e-4}, **more)
    assert lines_of(directory)[:2] == before and len(lines_of(directory)) == 3
    assert "-> " + str(folder / "model") in caplog.text
    summary = json.loads((directory / "summary.json").read_text())
    (resumed,) = summary["resumed"]
    assert resumed["step"] == 2 and resumed["changed"]["optimizer.lr"][1] == 1e-4
    assert resumed["changed"]["total_updates"] == [2, 3]
    if kind == "train":
        assert "Changed after step 2" in (directory / "report" / "index.html").read_text()


@pytest.mark.parametrize("kind", ["train", "sft", "reward"])
def test_another_configuration_of_the_same_weights_is_another_model(folder: Path, kind: str) -> None:
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        start(kind, folder, **({"steps": 3} if kind == "train" else {"max_steps": 3}))
    message = str(caught.value)
    assert message.startswith("model.path: found other configuration of the policy than ")
    assert "rope_theta 10000.0 there, rope_theta 20000.0 now" in message


def test_other_ends_of_a_response_are_refused(folder: Path) -> None:
    path = folder / "model" / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], 5]}))
    with pytest.raises(
        ValueError, match=r"end_of_sequence \[\d+\] there, end_of_sequence \[\d+, 5?\d*\] now"
    ):
        train(training(folder, steps=3))


def test_overwrite_trains_anew(folder: Path) -> None:
    first = load_file(folder / "train" / "hf" / "model.safetensors")
    train(training(folder, seed=3, optimizer={"lr": 1e-3}), overwrite=True)
    again = load_file(folder / "train" / "hf" / "model.safetensors")
    assert any(not torch.equal(first[name], value) for name, value in again.items())
    assert [line["step"] for line in lines_of(folder / "train")] == [1, 2]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gapo", {"rates": "adaptive", "eta": 20.0}),
        ("pcgrad", {"seed": 1}),
        ("nash_mtl", {"every": 3}),
    ],
)
def test_a_methods_memory_is_resumed(folder: Path, name: str, options: dict[str, Any]) -> None:
    """The weights of a run that was stopped after two steps are those of one that was not."""
    common: dict[str, Any] = {
        "aggregation": {"name": name, "options": options},
        # With held-out prompts progress begins before the first rollout, where rates are then not equal.
        "data": {"heldout_source": None, "heldout_prompts": 0},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
    }
    train(training(folder, output_dir=str(folder / "straight"), steps=4, **common))
    for steps in (2, 4):
        train(training(folder, output_dir=str(folder / "stopped"), steps=steps, **common))
    straight, stopped = lines_of(folder / "straight"), lines_of(folder / "stopped")
    for before, after in zip(straight, stopped, strict=True):
        for objective in ("short", "vowels"):
            for key in (f"weight/{objective}", f"reward/{objective}", f"grad_norm/{objective}"):
                assert before[key] == after[key], (before["step"], key)
    ratios = [line["weight/short"] / line["weight/vowels"] for line in straight]
    if name == "nash_mtl":  # kept: more digits than a log of two numbers loses
        assert ratios[1:3] == pytest.approx([ratios[0]] * 2, rel=1e-12) and ratios[3] != ratios[0]
    if name == "gapo":  # of two objectives with equal rates, both summands are of one length
        sizes = [
            ratio * a["grad_norm/short"] / a["grad_norm/vowels"]
            for ratio, a in zip(ratios, straight, strict=True)
        ]
        assert sizes[0] == pytest.approx(1.0, rel=1e-9) and abs(sizes[3] - 1) > 1e-3
