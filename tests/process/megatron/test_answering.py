"""Models that answer, one after another, in every layout, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega.engine.megatron.checkpoint import convert
from tests.helpers.logits import chosen_logprobs
from tests.helpers.perturbed import perturbed
from tests.helpers.ranks.check_answering import PROMPTS, TEMPERATURE
from tests.helpers.ranks.launch import launch
from tests.helpers.tiny import tiny_llama, tiny_qwen2

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP2-sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
}
# By turn: a policy and its reference. The last one has another shape.
TURNS = (("tuned", "base"), ("base", None), ("qwen", "tuned-checkpoint"))
CLOSE = 1e-4  # nats; a sum over layers and a vocabulary of 101 in fp32 is off by about 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answering")
    tiny_llama(folder / "base", vocab=101, tied=True)
    perturbed(folder / "base", folder / "tuned", seed=1)
    tiny_qwen2(folder / "qwen", vocab=101)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    convert.to_checkpoint(folder / "tuned", folder / "tuned-checkpoint")
    turns = [[str(folder / p), None if r is None else str(folder / r)] for p, r in TURNS]
    found = {}
    for ranks in (1, 2):
        names = [name for name, (size, _) in LAYOUTS.items() if size == ranks]
        jobs = [("check_answering", {"layout": LAYOUTS[name][1], "turns": turns}) for name in names]
        for name, outcome in zip(names, launch(ranks, jobs, folder), strict=True):
            assert "error" not in outcome, f"{name}: {outcome['error']}"
            found[name] = outcome["result"]["turns"]
    return found


@torch.no_grad()
def logprobs_of(directory: Path, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Of the response tokens, in float64; rows are right padded, so that padding has no influence."""
    model = AutoModelForCausalLM.from_pretrained(directory).double().eval()
    taken_BT = chosen_logprobs(model(tokens_BT).logits / TEMPERATURE, tokens_BT)
    return torch.nn.functional.pad(taken_BT, (1, 0)) * mask_BT


@torch.no_grad()
def greedy(directory: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    row = list(prompt)
    for _ in range(6):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == 1:
            break
    return row


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("turn", range(len(TURNS)))
def test_answers_and_log_probabilities(folder: Path, results: Any, layout: str, turn: int) -> None:
    policy, reference = TURNS[turn]
    found = results[layout][turn]
    tokens_BT, mask_BT = torch.tensor(found["tokens"]), torch.tensor(found["mask"])
    for row, prompt in enumerate(PROMPTS):
        length = len(prompt) + int(mask_BT[row].sum())
        assert tokens_BT[row, :length].tolist() == greedy(folder / policy, prompt)
    expected = {"policy": folder / policy}
    if reference is not None:
        expected["reference"] = folder / reference.removesuffix("-checkpoint")
    assert set(found) == {"tokens", "mask", *expected}
    for name, directory in expected.items():
        difference_BT = torch.tensor(found[name]) - logprobs_of(directory, tokens_BT, mask_BT)
        assert float(difference_BT.abs().max()) <= CLOSE
