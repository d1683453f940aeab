"""Adapters against PEFT on the same model in float64: outputs, gradients, updates, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega import aggregation
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.checkpoint import convert
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.planning.memory import predict
from tests.helpers import peft_models
from tests.helpers.logits import chosen_logprobs, relative_error
from tests.helpers.peft_gradients import adapter_rows
from tests.helpers.policy_gradients import RATE, SGD
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.resolved import resolved_run
from tests.helpers.tiny import tiny_llama, tiny_mixtral, tiny_qwen2, tiny_qwen3, tiny_qwen3_moe

ERROR = 1e-5  # fp32 through four layers against float64
FAMILIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and an adapter of each that changes it."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, make in FAMILIES.items():
        make(folder / name)
        peft_models.random_adapter(folder / name, folder / f"{name}-adapter")
    return folder


def engine_with(folder: Path, family: str = "llama", /, **sections: Any) -> Any:
    lora = {**peft_models.SETTINGS, "path": str(folder / f"{family}-adapter"), **sections.pop("lora", {})}
    optimizer = sections.pop("optimizer", SGD)
    model = {"lora": lora, **sections.pop("model", {})}
    config = check_engine.make_config(str(folder / family), {}, optimizer, model=model, **sections)
    return check_engine.build_engine(config)


def update(engine: Any) -> Any:
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    return batch, engine.update_policy(batch, check_engine.loss, aggregator)


def responses(logits_BTV: Tensor, batch: Any) -> Tensor:
    return chosen_logprobs(logits_BTV, batch.tokens_BT) * batch.response_mask_BT[:, 1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_is_pefts_and_reference_the_model_without(folder: Path, family: str) -> None:
    engine = engine_with(folder, family)
    batch = check_engine.global_batch(200)
    policy_BT, reference_BT = (engine.logprobs(batch, model)[:, 1:] for model in ("policy", "reference"))
    with_it = peft_models.logits_of(folder / family, folder / f"{family}-adapter", batch.tokens_BT)
    with torch.no_grad():
        without = AutoModelForCausalLM.from_pretrained(folder / family).double()(batch.tokens_BT).logits
    assert relative_error(policy_BT, responses(with_it, batch)) <= ERROR
    assert relative_error(reference_BT, responses(without, batch)) <= ERROR
    # The adapter matters: it moves log-probabilities by far more than the errors.
    assert relative_error(policy_BT, reference_BT) > 1e-2


STRATEGIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"forward": "one_pass"}, {}),
    ({"forward": "one_pass"}, {"model": {"recompute": "full"}}),
    ({"forward": "shared"}, {"micro_batch_size": 8}),
    ({"forward": "separate"}, {}),
    ({"forward": "separate"}, {"model": {"recompute": "full"}}),
    ({"store": "single"}, {"model": {"recompute": "selective"}}),
]


@pytest.mark.parametrize(("gradients", "sections"), STRATEGIES)
def test_rows_and_step_are_those_of_the_adapter(
    folder: Path, tmp_path: Path, gradients: dict[str, Any], sections: dict[str, Any]
) -> None:
    engine = engine_with(folder, gradients=gradients, **sections)
    trained = [p for p in engine.policy.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(
        p.numel() for p in peft_models.flat_adapter(folder / "llama", folder / "llama-adapter")
    )
    batch, report = update(engine)
    _, rows_MN = adapter_rows(folder / "llama", folder / "llama-adapter", batch)
    assert relative_error(report.gram, rows_MN @ rows_MN.t()) <= ERROR
    engine.export_adapter(tmp_path / "after")
    before_N = peft_models.flat_adapter(folder / "llama", folder / "llama-adapter")
    step_N = before_N - peft_models.flat_adapter(folder / "llama", tmp_path / "after")
    assert relative_error(step_N, RATE * report.weights @ rows_MN) <= 10 * ERROR  # of a small difference


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("forward", ["one_pass", "separate"])
@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe])
def test_adapters_of_attention_beside_frozen_experts(tmp_path: Path, make: Any, forward: str) -> None:
    """One pass, too: no expert has a gradient."""
    make(tmp_path / "model")
    adapter = peft_models.random_adapter(tmp_path / "model", tmp_path / "model-adapter", ATTENTION)
    engine = engine_with(
        tmp_path, "model", lora={"target_modules": ATTENTION}, gradients={"forward": forward}
    )
    batch, report = update(engine)
    _, rows_MN = adapter_rows(tmp_path / "model", adapter, batch)
    assert relative_error(report.gram, rows_MN @ rows_MN.t()) <= ERROR
    engine.export_adapter(tmp_path / "after")
    before_N = peft_models.flat_adapter(tmp_path / "model", adapter)
    step_N = before_N - peft_models.flat_adapter(tmp_path / "model", tmp_path / "after")
    assert relative_error(step_N, RATE * report.weights @ rows_MN) <= 10 * ERROR  # of a small difference


@pytest.mark.parametrize("forward", ["shared", "separate"])
def test_a_scope_of_layers_measures_their_adapters(folder: Path, forward: str) -> None:
    engine = engine_with(folder, gradients={"scope": [[1, 3]], "forward": forward}, micro_batch_size=8)
    batch, report = update(engine)
    names, rows_MN = adapter_rows(folder / "llama", folder / "llama-adapter", batch)
    inside = torch.tensor([".layers.1." in name or ".layers.2." in name for name in names])
    scoped_MN = rows_MN[:, inside]
    assert relative_error(report.gram, scoped_MN @ scoped_MN.t()) <= ERROR


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj"], ["k_proj", "o_proj", "down_proj"]])
def test_targets_alone_have_adapters(folder: Path, tmp_path: Path, targets: list[str]) -> None:
    adapter = peft_models.random_adapter(folder / "llama", tmp_path / "start", targets, use_rslora=True)
    lora = {"path": str(adapter), "target_modules": targets, "rank_stabilized": True}
    engine = engine_with(folder, lora=lora, gradients={"forward": "one_pass"})
    batch, report = update(engine)
    _, rows_MN = adapter_rows(folder / "llama", adapter, batch)
    assert relative_error(report.gram, rows_MN @ rows_MN.t()) <= ERROR
    engine.export_adapter(tmp_path / "adapter")
    engine.export_hf(tmp_path / "merged")
    check_exports(folder / "llama", tmp_path, batch.tokens_BT)


def check_exports(base: Path, folder: Path, tokens_BT: Tensor) -> None:
    """The merged weights are those that PEFT merges, and PEFT computes what the merged model does."""
    ours = AutoModelForCausalLM.from_pretrained(folder / "merged").double()
    theirs = peft_models.peft_model(base, folder / "adapter")
    with torch.no_grad():
        assert relative_error(ours(tokens_BT).logits, theirs(tokens_BT).logits) <= ERROR
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, value in ours.named_parameters():
        assert relative_error(value, merged[name]) <= 1e-6, name  # fp32 rounds


def test_generates_what_peft_does(folder: Path) -> None:
    engine = engine_with(folder)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    found = engine.generator.generate(prompts, SamplingParameters(12, temperature=0.0), seed=0)
    model = peft_models.peft_model(folder / "llama", folder / "llama-adapter")
    tokens_BT = torch.tensor(prompts)
    for _ in range(12):
        with torch.no_grad():
            tokens_BT = torch.cat([tokens_BT, model(tokens_BT).logits[:, -1].argmax(-1, keepdim=True)], 1)
    for row, length in enumerate(found.response_mask_BT.sum(1).tolist()):
        assert found.tokens_BT[row, : 4 + length].tolist() == tokens_BT[row, : 4 + length].tolist()


def test_checkpoint_holds_adapters_and_converts_to_the_merged_model(folder: Path, tmp_path: Path) -> None:
    adam = {"name": "adam", "lr": 0.01}
    engine = engine_with(folder, optimizer=adam)
    update(engine)
    engine.save(tmp_path / "checkpoint", {})
    engine.export_hf(tmp_path / "merged")
    _, after = update(engine)
    resumed = engine_with(folder, optimizer=adam)
    resumed.load(tmp_path / "checkpoint")
    _, again = update(resumed)
    assert torch.equal(again.gram, after.gram) and again.gradient_norm == after.gradient_norm
    convert.to_hf(tmp_path / "checkpoint", tmp_path / "converted")
    merged, converted = (check_engine.parameters(tmp_path / name) for name in ("merged", "converted"))
    assert merged.keys() == converted.keys()
    assert all(relative_error(merged[name], converted[name]) <= 1e-6 for name in merged)
    # A run that starts from the checkpoint trains all of the merged weights.
    config = check_engine.make_config(str(tmp_path / "checkpoint"), {}, SGD)
    from_checkpoint = MegatronEngine(
        resolved_run(config, shape=engine.shape), pad_id=0, eos_ids=[2], existing=worlds.enter(1, 1)
    )
    assert all(p.requires_grad for p in from_checkpoint.policy.parameters())
    from_checkpoint.export_hf(tmp_path / "loaded")
    loaded = check_engine.parameters(tmp_path / "loaded")
    assert merged.keys() == loaded.keys()
    assert all(relative_error(merged[name], loaded[name]) <= 1e-6 for name in merged)


def test_a_new_adapter_changes_nothing_and_is_drawn_as_peft_does(folder: Path) -> None:
    engine = engine_with(folder, lora={"path": None, "rank": 64})
    batch = check_engine.global_batch(200)
    policy_BT, reference_BT = engine.logprobs(batch, "policy"), engine.logprobs(batch, "reference")
    assert torch.equal(policy_BT, reference_BT)
    drawn = {n: p.detach() for n, p in engine.policy.modules[0].named_parameters() if n.endswith("lora_A")}
    for name, value in drawn.items():
        bound = value.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        # The largest of thousands of uniform numbers, and their standard deviation within a twentieth.
        assert 0.99 * bound <= float(value.abs().max()) <= bound, name
        assert abs(float(value.std()) / (bound / 3**0.5) - 1) <= 0.05, name
    assert len({float(value[0, 0]) for value in drawn.values()}) == len(drawn) == 28


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_plan_counts_the_adapters(folder: Path, dtype: str) -> None:
    engine = engine_with(folder, optimizer={"name": "adam"}, model={"dtype": dtype})
    update(engine)  # which makes the optimizer's state
    lora = {**peft_models.SETTINGS}
    config = check_engine.make_config(
        str(folder / "llama"), {}, {"name": "adam"}, model={"dtype": dtype, "lora": lora}
    )
    (stage,) = predict(resolved_run(config)).stages
    found = engine.resident()
    assert stage.reference == 0 and engine.reference is None
    assert found["parameters"] == stage.parameters
    for kind in ("gradients", "optimizer"):  # padding of Megatron's buckets: every parameter to 64 elements
        assert abs(getattr(stage, kind) - found[kind]) <= 0.15 * found[kind], kind
    assert 10 * stage.gradients < stage.parameters * (2 if dtype == "bf16" else 1)
