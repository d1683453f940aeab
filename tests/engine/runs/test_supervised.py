"""Whole runs of train-reward and sft in this process: what is learned, resumed, exported, refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gapo_mega.config import ObjectiveConfig
from gapo_mega.config.supervised import RewardModelConfig, SftConfig
from gapo_mega.objectives import build
from gapo_mega.runs.supervised import RewardRun, SftRun
from gapo_mega.types import Prompt
from tests.helpers.metrics_log import CLOCKED, metrics
from tests.helpers.tiny import byte_tokenizer, safe_rlhf_model, tiny_chat_model

GOOD, BAD = "yes of course", "no never"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    folder = tmp_path_factory.mktemp("supervised-runs")
    tiny_chat_model(folder / "model", smollm2)
    rows = []
    for i in range(120):
        question = f"\n\nHuman: May I have {i} of them?\n\nAssistant:"
        rows.append({"chosen": f"{question} {GOOD}, {i}", "rejected": f"{question} {BAD}, {i}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / name),
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": 12,
        "model": {"path": str(folder / "model"), "max_tokens": 100, **changes.pop("model", {})},
        "data": {"source": str(folder / "pairs.jsonl"), "heldout_fraction": 0.2},
        "optimizer": {"lr": 3e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "logging": {"progress": False, "tensorboard": False},
        **changes,
    }


@pytest.mark.parametrize("kind", [RewardRun, SftRun])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(
    folder: Path, tmp_path: Path, kind: Any, value: float
) -> None:
    """One number of the last parameter, in the middle of the run: no gradient of it is finite either."""
    config = {RewardRun: RewardModelConfig, SftRun: SftConfig}[kind]
    changes = {"gradients": {"max_nonfinite_steps": 100}, "checkpoint": {"every_steps": 2}}

    class Damaged(kind):  # type: ignore[misc]
        def train_step(self, step: int) -> dict[str, float]:
            metrics: dict[str, float] = super().train_step(step)
            if step == 2:
                with torch.no_grad():
                    list(self.engine._trainable.parameters())[-1].view(-1)[0] = value
            return metrics

    run = Damaged(config.model_validate(settings(folder, "", **changes) | {"output_dir": str(tmp_path)}))
    try:
        with pytest.raises(ValueError, match=r"^stopped: weights are not finite after step 4, neither saved"):
            run.run()
    finally:
        run.engine.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (tmp_path / "hf").exists()


def reward_run(folder: Path, name: str, **changes: Any) -> dict[str, float]:
    run = RewardRun(RewardModelConfig.model_validate(settings(folder, name, **changes)))
    try:
        return run.run()
    finally:
        run.engine.close()


def test_a_reward_model_learns_is_resumed_and_scores_as_an_objective(folder: Path) -> None:
    options = {
        "checkpoint": {"every_steps": 5},
        "evaluation": {"every_steps": 4},
        "model": {"keep_layers": 2},
    }
    measured = reward_run(folder, "reward", **options)
    directory = folder / "reward"
    assert measured["pairs"] == 24 and measured["accuracy"] >= 0.9  # guessing gives 0.5 +- 0.1
    assert json.loads((directory / "summary.json").read_text())["heldout"] == measured
    whole = metrics(directory, CLOCKED)
    assert [r["step"] for r in whole] == list(range(1, 13))
    assert whole[-1]["loss"] < 0.5 * whole[0]["loss"]
    assert [r["step"] for r in whole if "heldout/accuracy" in r] == [4, 8]
    exported = load_file(directory / "hf" / "model.safetensors")

    # The same command after a kill in step 11: on from the checkpoint of step 10, to the same bits.
    for path in (directory / "hf", directory / "checkpoints" / "step_00000012"):
        shutil.rmtree(path)
    assert reward_run(folder, "reward", **options) == measured
    assert metrics(directory, CLOCKED) == whole
    again = load_file(directory / "hf" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in exported.items())

    # Fewer steps than it has done: the summary says what the model has had.
    reward_run(folder, "reward", **options, max_steps=8)
    assert json.loads((directory / "summary.json").read_text())["steps"] == 12

    # transformers loads it whole, and it prefers what it was taught to prefer.
    _, report = AutoModelForSequenceClassification.from_pretrained(directory / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = json.loads((directory / "hf" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["architectures"] == ["LlamaForSequenceClassification"]
    options = {"model": str(directory / "hf"), "max_tokens": 100}
    objective = build(ObjectiveConfig(name="kind", kind="hf_classifier", options=options))
    prompts = [Prompt(0, "May I have 500 of them?"), Prompt(1, "May I have 500 of them?")]
    liked, disliked = objective.score(prompts, [f"{GOOD}, 500", f"{BAD}, 500"])
    assert liked > disliked


def test_fine_tuning_raises_the_likelihood_of_held_out_chats(folder: Path) -> None:
    changes = {"max_steps": 1, "optimizer": {"lr": 1e-9}}
    measured: list[dict[str, float]] = []
    for name, options in (("before", changes), ("after", {})):
        run = SftRun(SftConfig.model_validate(settings(folder, name, **options)))
        measured.append(run.run())
        run.engine.close()
    before, after = measured
    assert before["tokens"] == after["tokens"] and before["chats"] == after["chats"] == 24
    assert after["loss"] < 0.5 * before["loss"]
    assert after["perplexity"] == pytest.approx(torch.tensor(after["loss"]).exp().item(), rel=1e-5)
    AutoModelForCausalLM.from_pretrained(folder / "after" / "hf")


def test_fine_tuning_of_adapters_changes_their_layers_alone(folder: Path) -> None:
    """By a matrix of their rank; with logits in chunks; and a run that is resumed goes on with them."""
    lora = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
    options: dict[str, Any] = {
        "model": {"lora": lora, "logits_chunk": 5},
        "checkpoint": {"every_steps": 3, "export_adapter": True},
        "optimizer": {"lr": 2e-2, "schedule": "constant", "warmup_fraction": 0.0},
    }
    for steps in (3, 6):
        changed = {**options, "max_steps": steps, "model": dict(options["model"])}
        run = SftRun(SftConfig.model_validate(settings(folder, "adapters", **changed)))
        run.run()
        run.engine.close()
    losses = [record["loss"] for record in metrics(folder / "adapters", CLOCKED)]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / "adapters" / "hf" / "model.safetensors")
    assert set(after) == set(before)
    for name, value in before.items():
        change = (after[name] - value).double()
        if any(module in name for module in lora["target_modules"]):
            # Rounding to fp32 adds singular values of 1e-7 of the weights'.
            assert int((torch.linalg.svdvals(change) > 1e-5).sum()) == 2, name
        else:
            assert not change.any(), name
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    merged = PeftModel.from_pretrained(base, folder / "adapters" / "adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in after.items())
    # The run that went on has set the first one's aside.
    assert (folder / "adapters" / "adapter.earlier-1" / "adapter_config.json").is_file()


def test_the_runs_own_template_goes_with_the_model(folder: Path) -> None:
    """Into checkpoints, too: they may be used as they are."""
    template = "{% for m in messages %}{{ m['role'] }} says {{ m['content'] }}<|im_end|>{% endfor %}"
    options = {"max_steps": 1, "checkpoint": {"every_steps": 1}}
    reward_run(folder, "template", **options, model={"chat_template": template})
    (checkpoint,) = (folder / "template" / "checkpoints").glob("step_*")
    for directory in (folder / "template" / "hf", checkpoint / "hf"):
        assert AutoTokenizer.from_pretrained(directory).chat_template == template


def test_what_training_would_drop_is_refused(folder: Path) -> None:
    directory = folder / "cost"
    safe_rlhf_model(directory)
    byte_tokenizer(directory)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"model\.path: .*cost is a score model with a bias"):
        reward_run(folder, "refused", model={"path": str(directory), "chat_template": template})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"keep_layers": 9}}, r"model\.keep_layers: found 9, accepted: 1 to 4"),
        ({"model": {"max_tokens": 4000}}, r"model\.max_tokens: found 4000, accepted: at most"),
        ({"model": {"path": "/no/such/model"}}, r"model\.path: found '/no/such/model'"),
        ({"batch_size": 6}, r"micro_batch_size: found 4, accepted"),
        ({"batch_size": 200}, r"batch_size: found 200, accepted: 1 to the 96 training items"),
        ({"parallel": {"tensor": 3}}, r"parallel\.tensor: found 3"),
        ({"model": {"lora": {"path": "/no/such/adapter"}}}, r"model\.lora\.path: .*no/such/adapter"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_built(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RewardRun(RewardModelConfig.model_validate(settings(folder, "refused", **changes)))
    assert not (folder / "refused").exists()
