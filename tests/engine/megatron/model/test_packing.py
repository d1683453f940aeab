"""Packed rows give what a row for every sequence gives: log-probabilities, gradients, values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gapo_mega import aggregation
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.model.forward import run_batch, split
from gapo_mega.engine.megatron.model.packing import in_rows, unpacked
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.types import TokenBatch
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.logits import chosen_logprobs, relative_error
from tests.helpers.policy_gradients import PARTS, RATE, SGD, WHOLE, Reference, engine_of, flat
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.sampled import random_kept
from tests.helpers.tiny import tiny_llama, tiny_mixtral, tiny_qwen2, tiny_qwen3

VOCABULARY = 200
LONGEST = check_engine.COLUMNS
# As small as may be, and one row for everything.
TIGHT, ROOMY = LONGEST, 1000
SIZES: dict[str, Any] = {
    "data": {"source": "unused", "max_prompt_tokens": 7},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": LONGEST - 7},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("packing") / "model"
    tiny_llama(directory, tied=True)
    yield directory
    worlds.leave()


def packed(tokens: int | None, /, **sections: Any) -> dict[str, Any]:
    """Sections of a configuration; None: unpacked."""
    return {**SIZES, "micro_batch_tokens": tokens, **sections}


FAMILIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3, "mixtral": tiny_mixtral}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_each_sequence_alone(family: str, tmp_path: Path) -> None:
    """Of policy and reference, whatever is packed with what; each sequence alone through transformers."""
    write: Callable[[Path], PreTrainedModel] = FAMILIES[family]
    write(tmp_path / "model")
    batch = check_engine.global_batch(VOCABULARY)
    options = {"experts_implementation": "eager"} if family == "mixtral" else {}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).double()
    expected_BT = torch.zeros(batch.tokens_BT.shape, dtype=torch.float64)
    for row, length in enumerate(batch.lengths_B.tolist()):
        tokens_1T = batch.tokens_BT[row : row + 1, :length]
        with torch.no_grad():
            expected_BT[row, 1:length] = chosen_logprobs(reference(tokens_1T).logits, tokens_1T)[0]
    expected_BT *= batch.response_mask_BT
    for tokens in (TIGHT, 50, ROOMY):
        with engine_of(tmp_path / "model", {}, PARTS, SGD, **packed(tokens)) as engine:
            for which in ("policy", "reference"):
                found_BT = engine.logprobs(batch, which)  # type: ignore[arg-type]
                # fp32 through four layers.
                assert relative_error(found_BT.double(), expected_BT) <= 1e-5


CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "separate": ({"forward": "separate"}, 50, {}),
    "separate, tight": ({"forward": "separate"}, TIGHT, {}),
    "shared": ({"forward": "shared"}, ROOMY, {}),
    "in turns": ({"forward": "shared"}, 50, {}),
    "one pass": ({"forward": "one_pass"}, ROOMY, {}),
    "one pass in parts": ({"forward": "one_pass"}, 50, {}),
    "one pass, tight": ({"forward": "one_pass"}, TIGHT, {}),
    "one pass, chunks of logits": ({"forward": "one_pass"}, 50, {"model": {"logits_chunk": 3}}),
    "one pass, full recomputation": ({"forward": "one_pass"}, 50, {"model": {"recompute": "full"}}),
    "single": ({"store": "single", "forward": "separate"}, 50, {}),
    "last layer": ({"scope": "last_layer", "forward": "separate"}, 50, {}),
    "last block shared": ({"scope": "last_block", "forward": "shared"}, ROOMY, {}),
    "full recomputation": ({"forward": "separate"}, 50, {"model": {"recompute": "full"}}),
    "selective recomputation": ({"forward": "separate"}, 50, {"model": {"recompute": "selective"}}),
    "chunks of logits": ({"forward": "separate"}, 50, {"model": {"logits_chunk": 3}}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_against_float64(case: str, model: Path, tmp_path: Path) -> None:
    """Losses, Gram matrix and update; the log counts the tokens that were computed."""
    gradients, tokens, sections = CASES[case]
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    with engine_of(model, gradients, PARTS, SGD, **packed(tokens, **sections)) as engine:
        batch = check_engine.local_part(check_engine.global_batch(VOCABULARY), engine)
        report = engine.update_policy(batch, check_engine.loss, aggregator)
        engine.export_hf(tmp_path / "one")
    reference = Reference(model, batch)
    rows = reference.rows(gradients.get("scope", "full"))
    assert report.padding == 1.0
    # As of unpacked rows: fp32 sums in another order, and a change that is a difference of fp32 parameters.
    torch.testing.assert_close(torch.tensor(report.losses).double(), reference.losses, rtol=1e-5, atol=1e-6)
    assert gram_error(report.gram, rows @ rows.T) <= 1e-5
    start = torch.cat([p.detach().flatten() for p in reference.model.parameters()])
    expected = RATE * (aggregator(rows @ rows.T) @ reference.rows())
    assert float((flat(tmp_path / "one") - start + expected).norm() / expected.norm()) <= 2e-4


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_one_pass_of_biases_and_of_norms_of_heads(family: str, tmp_path: Path) -> None:
    write: Callable[[Path], PreTrainedModel] = FAMILIES[family]
    write(tmp_path / "model")
    with engine_of(tmp_path / "model", {"forward": "one_pass"}, PARTS, SGD, **packed(50)) as engine:
        batch = check_engine.local_part(check_engine.global_batch(VOCABULARY), engine)
        report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo"))
    rows = Reference(tmp_path / "model", batch).rows()
    assert gram_error(report.gram, rows @ rows.T) <= 1e-5


def test_penalties_and_kept_tokens_are_those_of_each_sequence(model: Path) -> None:
    rollout = {**SIZES["rollout"], "temperature": 0.7, "repetition_penalty": 1.3, "top_k": 20}
    batch = check_engine.global_batch(VOCABULARY)
    kept, _ = random_kept(batch.tokens_BT, batch.response_mask_BT, VOCABULARY, 0.1)
    batch = dataclasses.replace(batch, kept=kept)
    found = []
    for tokens in (None, 50):
        with engine_of(model, {}, PARTS, SGD, **packed(tokens, rollout=rollout)) as engine:
            found.append(engine.logprobs(batch, "policy"))
    assert relative_error(found[1], found[0]) <= 1e-5


@pytest.fixture
def engine(model: Path) -> Iterator[MegatronEngine]:
    with engine_of(model, {}, WHOLE, SGD, **packed(ROOMY)) as built, megatron_device():
        yield built


@torch.no_grad()
def outputs(engine: MegatronEngine, batch: TokenBatch) -> Tensor:
    """``[B, T, V]`` from one packed row."""
    return unpacked(run_batch(engine.policy.model, batch, 1), batch)


def test_a_sequence_sees_no_other_one(engine: MegatronEngine) -> None:
    """Bit by bit: attention is over the sequence's own rows, and other layers look at one position."""
    batch = check_engine.global_batch(VOCABULARY)
    (row,) = split(engine.policy.chunks, batch, 0, tokens=ROOMY).parts
    before_BTV = outputs(engine, row)
    for changed in range(row.batch_size):
        tokens_BT = row.tokens_BT.clone()
        tokens_BT[changed] = (tokens_BT[changed] + 17) % VOCABULARY
        after_BTV = outputs(engine, dataclasses.replace(row, tokens_BT=tokens_BT))
        same = [torch.equal(a, b) for a, b in zip(before_BTV, after_BTV, strict=True)]
        assert same == [other != changed for other in range(row.batch_size)]


def test_padding_behind_the_row_changes_nothing(engine: MegatronEngine) -> None:
    batch = check_engine.global_batch(VOCABULARY)
    (row,) = split(engine.policy.chunks, batch, 0, tokens=ROOMY).parts
    assert row.packed_width == int(row.lengths_B.sum())
    padded = dataclasses.replace(row, packed_width=row.packed_width + 13)
    tokens_BS = in_rows(padded).tokens_BT
    assert tokens_BS.shape == (1, padded.packed_width) and not tokens_BS[0, -13:].any()
    # fp32: a product of other rows beside them may be summed in other blocks.
    torch.testing.assert_close(outputs(engine, padded), outputs(engine, row), rtol=1e-5, atol=1e-5)


def test_rows_in_the_models_form() -> None:
    tokens_BT = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]])
    mask_BT = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 1]]).bool()
    row = in_rows(TokenBatch(tokens_BT, mask_BT, packed_width=10))
    assert row.tokens_BT.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]]
    assert row.response_mask_BT.int().tolist() == [[0, 0, 1, 0, 1, 0, 1, 0, 1, 0]]
    output_1SX = torch.arange(10.0)[None, :, None]
    found_BT = unpacked(output_1SX, TokenBatch(tokens_BT, mask_BT, packed_width=10))[..., 0]
    assert found_BT.tolist() == [[0, 1, 2, 0], [3, 4, 0, 0], [5, 6, 7, 8]]


def critic_of(model: Path, sections: dict[str, Any]) -> tuple[list[list[float]], Tensor]:
    config = check_engine.make_config(str(model), {}, {}, **sections)
    engine = check_engine.build_engine(config, with_critic=True)
    batch = check_engine.global_batch(VOCABULARY)
    losses = [engine.update_critic(batch, check_engine.value_loss) for _ in range(2)]
    return losses, engine.values(batch) * batch.response_mask_BT


def test_critics(model: Path) -> None:
    """Values and losses are those of unpacked rows; heads begin as zeros, so two updates come first."""
    losses, values_MBT = critic_of(model, packed(50))
    expected, expected_MBT = critic_of(model, packed(None))
    assert losses[1][0] != losses[0][0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    # Adam's first steps divide small gradients by their own size.
    torch.testing.assert_close(values_MBT, expected_MBT, rtol=1e-3, atol=1e-4)
