"""Log-probabilities in chunks of positions are those of all at once, with their gradients, in less memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gapo_mega import aggregation
from gapo_mega.engine.megatron.model import logprobs
from gapo_mega.measuring.allocation import measure_allocations
from tests.helpers.logits import relative_error
from tests.helpers.policy_gradients import SGD, engine_of
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.sampled import random_kept
from tests.helpers.tiny import tiny_llama

# fp32; the sum over chunks of the output layer's gradient has another order than that over positions.
ERROR = 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("chunks") / "model"
    tiny_llama(directory, tied=True)
    yield directory
    worlds.leave()


def measured(model: Path, chunk: int, gradients: dict[str, Any], /, **sections: Any) -> tuple[Any, Any]:
    """Log-probabilities, and the report of an update that is followed by another one."""
    settings = {"model": {"logits_chunk": chunk, **sections.pop("model", {})}, **sections}
    with engine_of(model, gradients, settings.pop("micro_batch", 4), SGD, **settings) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
        reports = [engine.update_policy(batch, check_engine.loss, aggregator) for _ in range(2)]
        return engine.logprobs(batch, "policy"), reports


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"forward": "separate"}, {}),
    ({"forward": "one_pass"}, {}),
    ({"forward": "one_pass"}, {"algorithm": {"entropy_beta": 0.02}}),
    ({"forward": "separate"}, {"rollout": {"prompts_per_step": 4, "samples_per_prompt": 2,
                                           "repetition_penalty": 1.3, "temperature": 0.7}}),
    ({"forward": "separate"}, {"model": {"recompute": "full"}}),
    ({"store": "single"}, {"micro_batch": 2}),
    ({"scope": "last_block", "forward": "separate"}, {}),
]  # fmt: skip


# Chunks of one token, and one that holds all, in the two strategies that make log-probabilities apart.
SIZED = [(*case, 7) for case in CASES] + [(*case, chunk) for case in CASES[:2] for chunk in (1, 1000)]


@pytest.mark.parametrize(("gradients", "sections", "chunk"), SIZED)
def test_chunks_change_nothing(
    model: Path, gradients: dict[str, Any], sections: dict[str, Any], chunk: int
) -> None:
    (whole_BT, whole), (found_BT, found) = (
        measured(model, size, gradients, **sections) for size in (0, chunk)
    )
    assert relative_error(found_BT, whole_BT) <= ERROR
    for report, expected in zip(found, whole, strict=True):
        assert relative_error(report.gram, expected.gram) <= 10 * ERROR
        assert report.losses == pytest.approx(expected.losses, rel=10 * ERROR, abs=ERROR)
        assert report.gradient_norm == pytest.approx(expected.gradient_norm, rel=10 * ERROR)


def test_no_more_logits_than_a_chunks_are_ever_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts rows where log-probabilities are made, which is behind every output layer of a pass."""
    rows: list[int] = []
    inner = logprobs._VocabParallelLogProbs.forward

    def counted(ctx: Any, logits_NV: torch.Tensor, *rest: Any) -> Any:
        rows.append(len(logits_NV))
        return inner(ctx, logits_NV, *rest)

    monkeypatch.setattr(logprobs._VocabParallelLogProbs, "forward", staticmethod(counted))
    measured(model, 8, {"forward": "one_pass"})
    assert 0 < max(rows) <= 8


def test_kept_tokens_of_a_chunk_are_its_own(model: Path) -> None:
    with engine_of(model, {"forward": "separate"}, 4, SGD) as engine:
        batch = check_engine.global_batch(200)
        kept, _ = random_kept(batch.tokens_BT, batch.response_mask_BT, 200, 0.1)
        batch = dataclasses.replace(batch, kept=kept)
        whole_BT = engine.logprobs(batch, "policy")
    config = check_engine.make_config(str(model), {}, SGD, model={"logits_chunk": 5})
    found_BT = check_engine.build_engine(config).logprobs(batch, "policy")
    assert relative_error(found_BT, whole_BT) <= ERROR


@pytest.mark.parametrize("forward", ["one_pass", "separate"])
def test_rows_without_a_response_token_do_not_matter(model: Path, forward: str) -> None:
    config = check_engine.make_config(
        str(model), {}, SGD, model={"logits_chunk": 3}, gradients={"forward": forward}
    )
    engine = check_engine.build_engine(config)
    batch = check_engine.global_batch(200)
    none = dataclasses.replace(batch, response_mask_BT=torch.zeros_like(batch.response_mask_BT))
    report = engine.update_policy(none, check_engine.loss, aggregation.build("weighted_sum"))
    assert report.losses == [0.0] * 3 and float(report.gram.abs().max()) == 0.0


def test_memory_falls_by_the_logits_and_operations_rise_by_one_product(tmp_path: Path) -> None:
    """Bytes that torch allocates in an update whose logits are larger than all else; and its products."""
    tiny_llama(tmp_path / "model", vocab=20_000, hidden_size=16, num_hidden_layers=2)
    padded, rows, peaks, flops = 20_096, 256, {}, {}
    for chunk in (0, 32):
        config = check_engine.make_config(
            str(tmp_path / "model"),
            {},
            SGD,
            model={"logits_chunk": chunk},
            gradients={"forward": "separate"},
            micro_batch_size=4,
        )
        engine = check_engine.build_engine(config)
        batch = check_engine.global_batch(20_000)
        mask_BT = torch.zeros(4, 80, dtype=torch.bool)
        mask_BT[:, 16:] = True
        advantages_MBT = torch.randn(3, 4, 1) * mask_BT
        empty_BT = torch.zeros(4, 80)
        batch = dataclasses.replace(
            batch,
            tokens_BT=torch.randint(3, 20_000, (4, 80)),
            response_mask_BT=mask_BT,
            group_B=torch.zeros(4, dtype=torch.int64),
            old_logprobs_BT=empty_BT,
            ref_logprobs_BT=empty_BT,
            scores_MB=torch.zeros(3, 4),
            token_rewards_MBT=torch.zeros(3, 4, 80),
            advantages_MBT=advantages_MBT,
        )
        aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
        engine.update_policy(batch, check_engine.loss, aggregator)
        with measure_allocations("cpu") as found:
            engine.update_policy(batch, check_engine.loss, aggregator)
        peaks[chunk] = found.peak_bytes
        with FlopCounterMode(display=False) as counter:
            engine.update_policy(batch, check_engine.loss, aggregator)
        flops[chunk] = counter.get_total_flops()
    # All rows of logits and of their gradient but a chunk's; a second gradient of the layer.
    expected = 2 * (rows - 32) * padded * 4 - padded * 16 * 4
    assert peaks[0] - peaks[32] == pytest.approx(expected, rel=0.1), peaks
    # What planning.flops counts as ``chunked``: the logits of a chunk once more in each of three backwards.
    assert flops[32] - flops[0] == 3 * 2 * rows * 16 * padded
