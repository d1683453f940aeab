"""Supervised training in one process: adapters against PEFT in float64, logits in chunks and all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gapo_mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from gapo_mega.config.lora import LoraConfig
from gapo_mega.engine.base import SupervisedSetup
from gapo_mega.engine.megatron.checkpoint import convert
from gapo_mega.engine.megatron.checkpoint.weights import head_if_any
from gapo_mega.engine.megatron.supervised import ChatEngine, PairEngine
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.types import SupervisedUpdate, TokenBatch
from tests.helpers import peft_models
from tests.helpers.logits import chosen_logprobs, relative_error
from tests.helpers.ranks import check_supervised, worlds
from tests.helpers.tiny import tiny_llama

RATE = 0.05
ERROR = 1e-5  # fp32 through four layers against float64
LORA = {"r": peft_models.RANK, "lora_alpha": peft_models.ALPHA, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a classifier, and an adapter of each that changes it."""
    folder = tmp_path_factory.mktemp("supervised")
    tiny_llama(folder / "chats", vocab=101)
    peft_models.random_adapter(folder / "chats", folder / "chats-adapter")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "chats", num_labels=1)
    model.config.pad_token_id = check_supervised.PAD
    model.save_pretrained(folder / "pairs")
    # Without the head, which PEFT would store beside the adapter and the engine trains by itself.
    peft_models.random_adapter(folder / "chats", folder / "pairs-adapter")
    return folder


def setup_of(folder: Path, kind: str, adapted: bool, chunk: int = 0) -> SupervisedSetup:
    lora = LoraConfig(**peft_models.SETTINGS, path=str(folder / f"{kind}-adapter"))
    source = folder / kind
    return SupervisedSetup(
        shape=shape_of(HFDirectory(source).config),
        source=source,
        model=ModelConfig(path=str(source)),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(
            name="sgd", distributed=False, lr=RATE, schedule="constant", warmup_fraction=0.0, clip_grad=0.0
        ),
        total_steps=2,
        micro_batch=4,
        seed=1,
        config={},
        lora=lora if adapted else None,
        chunk=chunk,
    )


def engine_of(folder: Path, kind: str, adapted: bool, chunk: int = 0) -> ChatEngine | PairEngine:
    setup = setup_of(folder, kind, adapted, chunk)
    world = worlds.enter_layout(setup.parallel)
    if kind == "chats":
        return ChatEngine(setup, existing=world)
    head = head_if_any(setup.source)
    return PairEngine(setup, head=head, center=0.0, pad_id=check_supervised.PAD, existing=world)


def batch_of(kind: str) -> TokenBatch:
    return check_supervised.batch_of(kind, 0, 0, 1)


def loss_of(model: Any, kind: str, batch: TokenBatch) -> Tensor:
    """Cross entropy of the marked tokens; the Bradley-Terry loss of scores at the marked places."""
    if kind == "chats":
        chosen = chosen_logprobs(model(batch.tokens_BT).logits, batch.tokens_BT)
        return -chosen[batch.response_mask_BT[:, 1:]].mean()
    hidden = model.model(batch.tokens_BT).last_hidden_state
    scores_B = (hidden @ model.score.weight.t())[..., 0][batch.response_mask_BT]
    chosen, rejected = scores_B.view(-1, 2).unbind(dim=1)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def reference_of(folder: Path, kind: str) -> Any:
    """PEFT's model in float64; of a classifier the head is trained with the adapters."""
    if kind == "chats":
        return peft_models.peft_model(folder / "chats", folder / "chats-adapter")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "pairs").double()
    model = get_peft_model(base, PeftConfig(**{**LORA, "target_modules": LINEARS})).double().eval()
    own = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "chats").double(), folder / "pairs-adapter"
    )
    adapters = {name: value for name, value in own.state_dict().items() if "lora_" in name}
    missing, unexpected = model.load_state_dict(adapters, strict=False)
    assert not unexpected and not any("lora_" in name for name in missing)
    model.base_model.model.score.weight.requires_grad_(True)
    return model


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_adapters_are_pefts(folder: Path, tmp_path: Path, kind: str) -> None:
    """Loss, norm and update of a step; everything else stays; the export and the checkpoint are merged."""
    engine, batch = engine_of(folder, kind, adapted=True), batch_of(kind)
    update = engine.update(batch)
    engine.export_hf(tmp_path / "hf")
    engine.save(tmp_path / "checkpoint", {})
    measured_B = engine.measure(batch)

    model = reference_of(folder, kind)
    inner = model if kind == "chats" else model.base_model.model
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = loss_of(inner, kind, batch)
    gradients = torch.autograd.grad(loss, trained)
    assert update.loss == pytest.approx(float(loss), rel=ERROR)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert update.gradient_norm == pytest.approx(float(norm), rel=ERROR)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter -= RATE * gradient
    expected = model.merge_and_unload().state_dict()
    found = HFDirectory(tmp_path / "hf")
    assert set(found.names) <= set(expected)
    for name in found.names:
        assert relative_error(found.read(name).double(), expected[name]) <= ERROR, name
    if kind == "pairs":
        start = HFDirectory(folder / "pairs").read("score.weight")
        assert relative_error(found.read("score.weight"), start) > 100 * ERROR  # the head learns, too

    convert.to_hf(tmp_path / "checkpoint", tmp_path / "converted")
    converted = HFDirectory(tmp_path / "converted")
    assert all(torch.equal(converted.read(name), found.read(name)) for name in found.names)

    resumed = engine_of(folder, kind, adapted=True)
    resumed.load(tmp_path / "checkpoint")
    assert torch.equal(resumed.measure(batch), measured_B)


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_peft_reads_the_exported_adapter_as_the_exported_model(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    """On the model that training began with; a score model's head comes with the adapter."""
    engine, batch = engine_of(folder, kind, adapted=True), batch_of(kind)
    engine.update(batch)
    engine.export_hf(tmp_path / "hf")
    engine.export_adapter(tmp_path / "adapter")
    auto = AutoModelForCausalLM if kind == "chats" else AutoModelForSequenceClassification
    model = PeftModel.from_pretrained(auto.from_pretrained(folder / kind), tmp_path / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(folder / kind)
    merged, found = model.merge_and_unload().state_dict(), HFDirectory(tmp_path / "hf")
    start = HFDirectory(folder / kind)
    for name in found.names:
        assert relative_error(found.read(name).double(), merged[name].double()) <= 1e-6, name
    changed = "score.weight" if kind == "pairs" else "model.layers.0.self_attn.q_proj.weight"
    assert relative_error(found.read(changed), start.read(changed)) > 100 * ERROR


def test_chunks_of_logits_change_nothing(folder: Path) -> None:
    batch = batch_of("chats")
    updates: list[list[SupervisedUpdate]] = []
    measured: list[Tensor] = []
    for chunk in (0, 1, 5, 1000):
        engine = engine_of(folder, "chats", adapted=False, chunk=chunk)
        updates.append([engine.update(batch) for _ in range(2)])
        measured.append(engine.measure(batch))
    assert updates[0][0].loss != updates[0][1].loss
    for found, measured_B in zip(updates[1:], measured[1:], strict=True):
        # fp32; the sum over chunks of the output layer's gradient has another order than that over positions.
        assert relative_error(measured_B, measured[0]) <= 1e-5
        for one, other in zip(found, updates[0], strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-6)
            assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
