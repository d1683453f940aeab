"""Score models, Bradley-Terry training and fine-tuning in every layout, against transformers and autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaModel

from gapo_mega.engine.megatron.checkpoint import convert
from tests.helpers.hf_directories import classifier
from tests.helpers.ranks.check_supervised import PAD, STEPS, chats, conversations, pairs
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import safe_rlhf_model, tiny_llama

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP2-sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"context": 2}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "PP2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    # Beside a policy whose experts these ranks share; the models here have none.
    "DP2xEP2": (2, {"expert": 2}),
    "TP2xEP2": (2, {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 1}),
}
# Both sides sum in different orders: some 1e-6 of the greatest score or loss in fp32. Adam's division by a
# small second moment makes more of it in three steps.
FORWARD, TRAINED = 2e-5, 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervised")
    classifier(folder / "classifier")
    safe_rlhf_model(folder / "cost")
    safe_rlhf_model(folder / "reward", "reward")
    tiny_llama(folder / "language", vocab=101, tied=True)
    convert.to_checkpoint(folder / "cost", folder / "cost-checkpoint", tensor=2)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for ranks in (1, 2, 4):
        cases = [
            (layout, kind, model)
            for layout, (size, _) in LAYOUTS.items()
            if size == ranks
            for kind, models in (
                ("score", ("classifier", "cost", "reward", "cost-checkpoint")),
                ("pairs", ("language", "classifier")),
                ("chats", ("language",)),
            )
            for model in models
            if layout in ("one", "TP2xPP2") or model not in ("reward", "classifier")
            if kind == "score" or "expert" not in LAYOUTS[layout][1]
        ]
        jobs = [
            (
                "check_supervised",
                {
                    "kind": kind,
                    "model": str(folder / model),
                    "layout": LAYOUTS[layout][1],
                    "export": str(folder / f"{layout}-{kind}-{model}"),
                },
            )
            for layout, kind, model in cases
        ]
        for case, outcome in zip(cases, launch(ranks, jobs, folder), strict=True):
            assert "error" not in outcome, f"{case}: {outcome['error']}"
            found[case] = outcome["result"]
    return found


@torch.no_grad()
def classifier_scores(directory: Path, rows: list[list[int]]) -> Tensor:
    """One at a time, so that nothing is padded."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    return torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])


@torch.no_grad()
def safe_rlhf_scores(directory: Path, rows: list[list[int]]) -> Tensor:
    """By the definition: head of the last hidden state, normalised; a cost is turned round."""
    tensors = load_file(directory / "model.safetensors")
    model = LlamaModel.from_pretrained(directory).eval()
    backbone = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(backbone)
    weight, bias = tensors["score_head.weight"], tensors["score_head.bias"]
    ends = [model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    raw = torch.stack([end @ weight[0] + bias[0] for end in ends])
    if directory.name == "reward":
        return (raw - tensors["normalizer.mean"]) / tensors["normalizer.var"].sqrt()
    return -raw / tensors["normalizer.var"].sqrt()


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_the_original_model(folder: Path, results: Any, layout: str) -> None:
    rows = conversations()
    assert any(row[-1] == PAD for row in rows)
    for (found_layout, kind, model), result in results.items():
        if found_layout == layout and kind == "score":
            source = folder / model.removesuffix("-checkpoint")
            of = classifier_scores if model == "classifier" else safe_rlhf_scores
            assert_close(result["scores"], of(source, rows), FORWARD)


def trained_by_autograd(folder: Path, kind: str, model: str) -> tuple[list[float], Any]:
    """The same updates by transformers, torch autograd and torch's Adam: losses, and the model."""
    if kind == "chats":
        network = AutoModelForCausalLM.from_pretrained(folder / "language")
    else:
        options = {"num_labels": 1, "pad_token_id": PAD}
        network = AutoModelForSequenceClassification.from_pretrained(folder / model, **options)
        if model == "language":
            torch.nn.init.zeros_(network.score.weight)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        loss = pair_loss(network, step) if kind == "pairs" else chat_loss(network, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses, network.eval()


def pair_loss(network: Any, step: int) -> Tensor:
    total = torch.zeros(())
    for chosen, rejected in pairs(step):
        s, t = (network(torch.tensor([row])).logits[0, 0] for row in (chosen, rejected))
        total = total - torch.log(torch.sigmoid(s - t)) + 0.01 * ((s + t) / 2) ** 2
    return total / len(pairs(step))


def chat_loss(network: Any, step: int) -> Tensor:
    total, count = torch.zeros(()), 0
    for row, mask in chats(step):
        logprobs = network(torch.tensor([row])).logits[0].log_softmax(dim=-1)
        for position in range(1, len(row)):
            if mask[position]:
                total, count = total - logprobs[position - 1, row[position]], count + 1
    return total / count


@pytest.mark.parametrize(
    ("kind", "model"), [("pairs", "language"), ("pairs", "classifier"), ("chats", "language")]
)
def test_training_is_that_of_autograd_in_every_layout(
    folder: Path, results: Any, kind: str, model: str
) -> None:
    losses, network = trained_by_autograd(folder, kind, model)
    seen = 0
    for layout in LAYOUTS:
        result = results.get((layout, kind, model))
        if result is None:
            continue
        seen += 1
        assert_close(result["losses"], losses, TRAINED)
        assert result["losses"][0] == pytest.approx(losses[0], rel=FORWARD)
        exported = folder / f"{layout}-{kind}-{model}"
        auto = AutoModelForCausalLM if kind == "chats" else AutoModelForSequenceClassification
        loaded = auto.from_pretrained(exported).state_dict()
        for name, value in network.state_dict().items():
            assert_close(loaded[name], value.detach(), 5e-3)
        if kind == "pairs":  # what is exported scores as what was trained
            rows = [row for pair in pairs(99) for row in pair]
            assert_close(result["measured"], classifier_scores(exported, rows), FORWARD)
    assert seen >= 2


def test_a_training_checkpoint_becomes_the_exported_model(folder: Path, results: Any, tmp_path: Path) -> None:
    assert results
    for case in ("TP2xPP2-pairs-language", "DP2-chats-language"):
        convert.to_hf(folder / f"{case}-checkpoint", tmp_path / case)
        exported = load_file(folder / case / "model.safetensors")
        converted = load_file(tmp_path / case / "model.safetensors")
        assert exported.keys() == converted.keys()
        assert all(torch.equal(converted[name], value) for name, value in exported.items())
        assert (tmp_path / case / "config.json").read_text() == (folder / case / "config.json").read_text()


def test_an_adapter_with_its_head_scores_as_what_was_trained(folder: Path, tmp_path: Path) -> None:
    """PEFT's on the language model, from ranks that split layers and tensors: 2 hold the head, 2 do not."""
    target_modules = ["q_proj", "o_proj", "down_proj"]
    arguments = {
        "kind": "pairs",
        "model": str(folder / "language"),
        "layout": LAYOUTS["TP2xPP2"][1],
        "export": str(tmp_path / "hf"),
        "lora": {"rank": 2, "target_modules": target_modules},
    }
    (outcome,) = launch(4, [("check_supervised", arguments)], tmp_path)
    assert "error" not in outcome, outcome["error"]
    base = AutoModelForSequenceClassification.from_pretrained(
        folder / "language", num_labels=1, pad_token_id=PAD
    )
    model = PeftModel.from_pretrained(base, tmp_path / "hf-adapter").eval()
    rows = [row for pair in pairs(99) for row in pair]
    with torch.no_grad():
        scores = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])
    assert float(scores.std()) > 0
    assert_close(outcome["result"]["measured"], scores, FORWARD)
    names = load_file(tmp_path / "hf-adapter" / "adapter_model.safetensors")
    assert len(names) == 4 * len(target_modules) * 2 + 1  # A and B in four layers, and the head
