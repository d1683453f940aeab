"""`gapo-mega train-reward`, `sft` and `train-pairs` on two processes, against the same run in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from gapo_mega.config.supervised import PairsConfig, RewardModelConfig, SftConfig
from gapo_mega.runs.pairs import PairsRun
from gapo_mega.runs.supervised import RewardRun, SftRun
from tests.helpers.commands import run
from tests.helpers.tiny import tiny_chat_model

HELD_OUT = 7  # of an odd number, data ranks hold different shares
GATHER = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# Summation order, made more of by six steps of Adam: 5e-6 of the greatest weight was seen.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    tiny_chat_model(folder / "model", smollm2)
    for name, count in (("train", 32), ("heldout", HELD_OUT)):
        rows = []
        for i in range(count):
            question = f"\n\nHuman: May I have {i} {name}s?\n\nAssistant:"
            rows.append(
                {"chosen": f"{question} yes, {i}" + " please" * (i % 3), "rejected": f"{question} no"}
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    sources = {"source": str(folder / "train.jsonl"), "heldout_source": str(folder / "heldout.jsonl")}
    return {
        "output_dir": str(folder / name),
        "batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": 6,
        "model": {"path": str(folder / "model"), "max_tokens": 100},
        "data": sources,
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "logging": {"progress": False, "tensorboard": False},
        **changes,
    }


def command(
    folder: Path, verb: str, name: str, whole: dict[str, Any] | None = None, **changes: Any
) -> dict[str, float]:
    """The summary's held-out measures of a run on two processes; ``whole`` has all of its settings."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(whole or settings(folder, name, **changes)))
    done = run(verb, "--config", path, "--nproc", 2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.count("held-out data") == 1
    measured: dict[str, float] = json.loads((folder / name / "summary.json").read_text())["heldout"]
    return measured


def one_process(alone: RewardRun | SftRun | PairsRun) -> dict[str, float]:
    try:
        return alone.run()
    finally:
        alone.engine.close()


def assert_same_weights(one: Path, other: Path) -> None:
    found, expected = (load_file(path / "hf" / "model.safetensors") for path in (one, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= TOLERANCE * float(value.abs().max()), name


def test_train_reward_on_two_data_ranks(folder: Path) -> None:
    two = command(folder, "train-reward", "reward2")
    one = one_process(RewardRun(RewardModelConfig.model_validate(settings(folder, "reward1"))))
    assert two["pairs"] == HELD_OUT and 0 < two["length_baseline"] <= 1
    assert two == pytest.approx(one, rel=TOLERANCE)
    assert_same_weights(folder / "reward2", folder / "reward1")


def test_sft_on_two_pipeline_stages(folder: Path) -> None:
    data = {"heldout_fraction": 0.2, "source": str(folder / "train.jsonl")}
    two = command(folder, "sft", "sft2", data=data, parallel={"pipeline": 2})
    one = one_process(SftRun(SftConfig.model_validate(settings(folder, "sft1", data=data))))
    assert two == pytest.approx(one, rel=TOLERANCE)
    assert_same_weights(folder / "sft2", folder / "sft1")


def test_a_data_rank_without_held_out_rows_keeps_nobody_waiting(folder: Path) -> None:
    """Parameters travel when the first forward asks for them, and one rank has none to run."""
    rows = (folder / "heldout.jsonl").read_text().splitlines()
    (folder / "one_row.jsonl").write_text(rows[0] + "\n")
    data = {"source": str(folder / "train.jsonl"), "heldout_source": str(folder / "one_row.jsonl")}
    optimizer = settings(folder, "")["optimizer"]
    short: dict[str, Any] = {"data": data, "max_steps": 2}
    gathered = command(folder, "sft", "gather", optimizer={**optimizer, **GATHER}, **short)
    plain = command(folder, "sft", "plain", optimizer=optimizer, **short)
    assert gathered == plain, "an all-gather is a copy"
    assert_same_weights(folder / "gather", folder / "plain")


def test_train_pairs_in_other_layouts(folder: Path) -> None:
    """Two data ranks, and two stages of a pipeline; the objectives have other numbers of pairs."""
    rows = (folder / "train.jsonl").read_text().splitlines()
    turned = [json.loads(row) for row in rows[:20]]
    turned = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in turned]
    (folder / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    objectives = [
        {
            "name": name,
            "data": {"source": str(folder / file), "heldout_source": str(folder / "heldout.jsonl")},
        }
        for name, file in (("polite", "train.jsonl"), ("brief", "turned.jsonl"))
    ]
    changes: dict[str, Any] = {"objectives": objectives, "aggregation": {"name": "mgda"}}

    def of(name: str, **more: Any) -> dict[str, Any]:
        found = settings(folder, name, **changes, **more)
        del found["data"]
        return found

    one = one_process(PairsRun(PairsConfig.model_validate(of("pairs1"))))
    assert one["pairs/polite"] == one["pairs/brief"] == HELD_OUT
    for name, more in (("pairs-dp2", {}), ("pairs-pp2", {"parallel": {"pipeline": 2}})):
        two = command(folder, "train-pairs", name, of(name, **more))
        assert two == pytest.approx(one, rel=TOLERANCE, abs=TOLERANCE)
        assert_same_weights(folder / name, folder / "pairs1")
