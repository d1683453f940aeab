"""Whole runs of train-pairs in this process, against transformers and autograd in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from gapo_mega.config.supervised import PairsConfig
from gapo_mega.runs.pairs import PairsRun
from tests.helpers.metrics_log import metrics
from tests.helpers.tiny import tiny_chat_model

NAMES = ("kind", "short")
BETA = 0.3
# fp32 against float64: sums of some dozen log-probabilities, and three steps whose errors add up.
LOSSES, GRADIENTS = 1e-5, 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    folder = tmp_path_factory.mktemp("pair-runs")
    tiny_chat_model(folder / "model", smollm2)
    for name, good, bad, count in (
        ("kind", "yes of course", "no never", 60),
        ("short", "{}", "{} and so", 40),
    ):
        rows = []
        for i in range(count):
            both = {"chosen": good.format(i), "rejected": bad.format(i) + " on" * (i % 4)}
            rows.append({"prompt": f"May I {name} have {i}?", **both, "other": (i % 5 - 2) / 2})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, output: str, **changes: Any) -> PairsConfig:
    objectives = [
        {"name": name, "data": {"source": str(folder / f"{name}.jsonl"), "heldout_fraction": 0.2}}
        for name in NAMES
    ]
    for objective, more in zip(objectives, changes.pop("more", []), strict=False):
        objective["data"] |= more.pop("data", {})
        objective |= more
    return PairsConfig.model_validate(
        {
            "output_dir": str(folder / output),
            "batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 3,
            "model": {"path": str(folder / "model"), "max_tokens": 100, **changes.pop("model", {})},
            "objectives": objectives,
            "loss": {"beta": BETA, **changes.pop("loss", {})},
            "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0}
            | changes.pop("optimizer", {}),
            "logging": {"progress": False, "tensorboard": False},
            **changes,
        }
    )


def train(config: PairsConfig) -> tuple[PairsRun, dict[str, float]]:
    run = PairsRun(config)
    try:
        return run, run.run()
    finally:
        run.engine.close()


# -- against autograd ----------------------------------------------------------------------------------
class Reference:
    """The same steps by transformers and autograd in float64, one sequence at a time."""

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        self.policy = AutoModelForCausalLM.from_pretrained(config.model.path).double()
        self.frozen = AutoModelForCausalLM.from_pretrained(config.model.path).double().requires_grad_(False)

    @staticmethod
    def logprob(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        logits = model(ids[None]).logits[0, :-1].log_softmax(-1)
        taken: Tensor = logits.gather(-1, ids[1:, None]).squeeze(-1)[mask[1:]]
        return taken.sum()

    def loss(self, pairs: list[Any], weight: float) -> Tensor:
        """As TRL's ``DPOTrainer`` has it for sigmoid and ipo, with MODPO's margin."""
        settings, total = self.config.loss, torch.zeros((), dtype=torch.float64)
        for both, margin in pairs:
            ratios = []
            for ids, mask in both:
                ratio = self.logprob(self.policy, ids, mask) - self.logprob(self.frozen, ids, mask)
                ratios.append(ratio / mask.sum() if settings.length_normalized else ratio)
            logits = ratios[0] - ratios[1]
            if settings.name == "ipo":
                total = total + (logits - 1 / (2 * BETA)) ** 2
                continue
            scaled, smoothing = (BETA * logits - margin) / weight, settings.label_smoothing
            total = total - logsigmoid(scaled) * (1 - smoothing) - logsigmoid(-scaled) * smoothing
        return total / len(pairs)

    def step(self, sets: list[list[Any]], rate: float) -> tuple[list[float], Tensor]:
        """Losses and Gram matrix, before a step of plain gradient descent on the mean of the losses."""
        parameters = list(self.policy.parameters())
        losses = [
            self.loss(pairs, objective.weight)
            for pairs, objective in zip(sets, self.config.objectives, strict=True)
        ]
        rows = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
                for loss in losses
            ]
        )
        step, start = rows.mean(dim=0) * rate, 0
        with torch.no_grad():
            for parameter in parameters:
                parameter -= step[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
        return [float(loss) for loss in losses], rows @ rows.T


SGD = {
    "optimizer": {"name": "sgd", "distributed": False, "lr": 0.05, "clip_grad": 0.0},
    "aggregation": {"name": "weighted_sum"},
}
CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "smoothed, microbatches of pairs that are split": {
        "loss": {"label_smoothing": 0.1},
        "micro_batch_size": 1,
    },
    "ipo by length": {"loss": {"name": "ipo", "length_normalized": True}},
    "modpo": {"more": [{"weight": 0.4, "data": {"margins": {"other": 0.6}}}, {}]},
    "separate passes": {"gradients": {"forward": "separate"}},
    "shared passes": {"gradients": {"forward": "shared"}},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_autograd(folder: Path, name: str) -> None:
    config = settings(folder, f"autograd-{name}", **json.loads(json.dumps({**SGD, **CASES[name]})))
    run, _ = train(config)
    reference = Reference(config)
    for step, record in enumerate(metrics(Path(config.output_dir))):
        sets = [
            [pairs[i] for i in order.items(step)] for pairs, order in zip(run._train, run.orders, strict=True)
        ]
        losses, gram = reference.step(sets, rate=0.05)
        assert [record[f"loss/{n}"] for n in NAMES] == pytest.approx(losses, rel=LOSSES)
        norms = gram.diagonal().sqrt()
        assert [record[f"grad_norm/{n}"] for n in NAMES] == pytest.approx(norms.tolist(), rel=GRADIENTS)
        cosine = float(gram[0, 1] / norms[0] / norms[1])
        assert record["cosine/kind/short"] == pytest.approx(cosine, abs=GRADIENTS)
        assert [record[f"weight/{n}"] for n in NAMES] == [0.5, 0.5]
    found = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "hf").double().state_dict()
    for key, value in reference.policy.state_dict().items():
        assert float((found[key] - value).abs().max()) <= GRADIENTS * float(value.abs().max()), key


# -- runs ----------------------------------------------------------------------------------------------
def test_both_objectives_are_learned_and_a_run_is_resumed(folder: Path) -> None:
    options = {"max_steps": 12, "checkpoint": {"every_steps": 5}, "evaluation": {"every_steps": 4}}
    _, measured = train(settings(folder, "learned", **options))
    directory = folder / "learned"
    for name, heldout in (("kind", 12), ("short", 8)):
        assert measured[f"pairs/{name}"] == heldout
        assert measured[f"accuracy/{name}"] >= 0.9 and measured[f"loss/{name}"] < 0.6
        assert measured[f"margin/{name}"] == pytest.approx(
            measured[f"chosen_reward/{name}"] - measured[f"rejected_reward/{name}"]
        )
    whole = metrics(directory)
    assert [r["step"] for r in whole] == list(range(1, 13))
    first = whole[0]  # policy and reference are one
    assert first["loss/kind"] == pytest.approx(0.693147, abs=1e-5) and first["accuracy/kind"] == 0.5
    assert {"weight/kind", "predicted_change/short", "gradient_norm", "margin/short"} <= first.keys()
    assert not any(key.startswith("reward/") for key in first) and not {"kl", "kl_beta"} & first.keys()
    assert [r["step"] for r in whole if "heldout/accuracy/kind" in r] == [4, 8]
    assert json.loads((directory / "summary.json").read_text())["heldout"] == measured
    exported = load_file(directory / "hf" / "model.safetensors")

    # The same command after a kill in step 11: on from the checkpoint of step 10, to the same bits.
    for path in (directory / "hf", directory / "checkpoints" / "step_00000012"):
        shutil.rmtree(path)
    assert train(settings(folder, "learned", **options))[1] == measured
    assert metrics(directory) == whole
    again = load_file(directory / "hf" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in exported.items())

    with pytest.raises(ValueError, match=r"^loss\.beta: found 0\.5, but .* was written with 0\.3"):
        train(settings(folder, "learned", **options, loss={"beta": 0.5}))
    with pytest.raises(ValueError, match=r"^training rows: found other training rows than"):
        more = [{"data": {"heldout_fraction": 0.3}}]
        train(settings(folder, "learned", **options, more=more))


def test_one_objective_and_a_template_of_its_own(folder: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }} says {% if m['role'] == 'assistant' %}"
        "{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant says {% endif %}"
    )
    config = settings(
        folder, "one", model={"chat_template": template}, checkpoint={"every_steps": 2, "keep": 1}
    )
    config = config.model_copy(update={"objectives": config.objectives[:1]})
    run, measured = train(config)
    assert run.total_steps == 3 and measured.keys() >= {"loss/kind", "accuracy/kind"}
    (checkpoint,) = (folder / "one" / "checkpoints").glob("step_*")
    for directory in (folder / "one" / "hf", checkpoint / "hf"):
        assert AutoTokenizer.from_pretrained(directory).chat_template == template


def test_an_epoch_is_one_of_the_longest_data(folder: Path) -> None:
    run = PairsRun(settings(folder, "epochs", epochs=2, max_steps=None))
    try:
        counts = [order.count for order in run.orders]
        assert counts == [48, 32] and run.total_steps == 2 * (48 // 4)
        seen = [i for step in range(24) for i in run.orders[1].items(step)]
        assert sorted(seen) == sorted([*range(32)] * 3)
    finally:
        run.session.close()
        run.engine.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "micro_batch_size": 4}, r"^micro_batch_size: found 4, accepted"),
        ({"batch_size": 40}, r"^batch_size: found 40, accepted: 1 to the 32 training items"),
        ({"more": [{}, {"data": {"source": "none.jsonl"}}]}, r"^objectives\.1\.data\.source: file 'none"),
        (
            {"more": [{"data": {"margins": {"no": 1.0}}}]},
            r"^objectives\.0\.data\.margins\.no: found",
        ),
        ({"aggregation": {"name": "gapp"}}, r"^aggregation\.name: found 'gapp'"),
        (
            {"gradients": {"metric": "adam"}, "optimizer": {"name": "sgd", "distributed": False}},
            r"^gradients\.metric: found adam with optimizer\.name sgd, accepted: euclidean$",
        ),
        ({"model": {"chat_template": "{{ messages | length }}"}}, r"^model\.chat_template: changes what is"),
        ({"model": {"max_tokens": 4000}}, r"^model\.max_tokens: found 4000, accepted: at most"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_built(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PairsRun(settings(folder, "refused", **changes))
    assert not (folder / "refused").exists()


def test_adapters_are_trained_and_merged(folder: Path) -> None:
    """Their layers change by a matrix of their rank, and nothing else does."""
    model = {"lora": {"rank": 2, "target_modules": ["v_proj"]}, "logits_chunk": 7}
    checkpoint = {"export_adapter": True}
    train(settings(folder, "adapters", model=model, optimizer={"lr": 1e-2}, checkpoint=checkpoint))
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / "adapters" / "hf" / "model.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {name for name in before if "v_proj" in name}
    for name in changed:
        # Rounding to fp32 adds singular values of 1e-7 of the weights'.
        change = (after[name] - before[name]).double()
        assert int((torch.linalg.svdvals(change) > 1e-5).sum()) == 2
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    merged = PeftModel.from_pretrained(base, folder / "adapters" / "adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in after.items())
