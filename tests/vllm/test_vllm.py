"""The vLLM back end with a real vLLM (make test-vllm); skipped without GAPO_VLLM_PYTHON, that has it.

One server a model. Starting one takes a minute or more on a CPU, and so does its first response.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega import aggregation
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.rollout.backends import Policy
from gapo_mega.rollout.backends.vllm import Vllm
from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.servers.client import VllmServer
from gapo_mega.types import Generation, TokenBatch
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.tiny import tiny_llama

PYTHON = os.environ.get("GAPO_VLLM_PYTHON")
SMOLLM = Path(os.environ.get("GAPO_SMOLLM", "models/SmolLM2-135M-Instruct"))
pytestmark = pytest.mark.skipif(PYTHON is None, reason="make test-vllm has a vLLM")

GREEDY = SamplingParameters(12, temperature=0.0)
# Two implementations of one model in fp32, log-probabilities of size 5.
CLOSE = 1e-4
# In bf16 a log-probability of the tiny model is 0.011 off that of fp32 in the mean (transformers, temperature
# 0.7). Two implementations that round independently differ by sqrt(2) of that; twice this is allowed.
BF16_CLOSE = 2 * 2**0.5 * 0.011


@dataclass
class Setup:
    """A model in our engine and in a server, which loads the same directory by itself."""

    engine: MegatronEngine
    rollouts: Vllm
    prompts: list[list[int]]
    directory: Path
    loaded: list[Generation]  # by the server's own weights, before it got ours


def set_up(directory: Path, vocabulary: int, eos: int, dtype: str = "fp32", lr: float = 1.0) -> Setup:
    sections: dict[str, Any] = {
        "model": {"dtype": dtype},
        "data": {"source": "unused", "max_prompt_tokens": 28},
        "rollout": {
            **{"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 90},
            **{"temperature": 0.7, "repetition_penalty": 1.2, "backend": "vllm", "batch_size": 128},
            # The last of an argument counts: this server has right weights before it gets ours.
            "vllm": {
                "python": PYTHON,
                "arguments": ["--enforce-eager", "--load-format", "auto"],
                "patience": 2,
                "start_timeout": 1500,
                "piece_mib": 1 if vocabulary < 1000 else 64,
            },
        },
    }
    config = check_engine.make_config(
        str(directory), {}, {"name": "sgd", "distributed": False, "lr": lr}, **sections
    )
    Vllm.check(config)
    engine = check_engine.build_engine(config)
    rollouts = Vllm(Policy(engine, directory, 0, (eos,), vocabulary), config)
    source = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, vocabulary, (n,), generator=source).tolist() for n in (5, 1, 9, 23)]
    prompts.append(prompts[2])
    return Setup(engine, rollouts, prompts, directory, before_any_update(rollouts, prompts))


def before_any_update(rollouts: Vllm, prompts: list[list[int]]) -> list[Generation]:
    """Greedy responses of the weights that the server has read."""
    rollouts._servers = [VllmServer(url, rollouts._patience) for url in rollouts._urls()]
    rollouts._stale("")  # waits until it is there
    rollouts._label = rollouts._servers[0].version()
    return one_by_one(rollouts, prompts)


def one_by_one(rollouts: Vllm, prompts: list[list[int]]) -> list[Generation]:
    """Greedy responses. What shares a batch would change the order of sums, and so the last bits."""
    return [rollouts.generate([prompt], GREEDY, 1) for prompt in prompts]


def assert_same_bits(mine: list[Generation], other: list[Generation]) -> None:
    for one, two in zip(mine, other, strict=True):
        assert torch.equal(one.tokens_BT, two.tokens_BT)
        assert torch.equal(one.logprobs_BT, two.logprobs_BT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_llama(directory, head_dim=64)  # vLLM's attention on CPUs takes no heads of 16
    built = set_up(directory, 200, 2)
    yield built
    built.rollouts.close()
    worlds.leave()


def responses(generation: Generation) -> list[list[int]]:
    pairs = zip(generation.tokens_BT, generation.response_mask_BT, strict=True)
    return [tokens_T[mask_T].tolist() for tokens_T, mask_T in pairs]


def of_transformers(directory: Path, prompts: Sequence[Sequence[int]], eos: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            repetition_penalty=1.0,
        )
        found.append(whole[0, len(prompt) :].tolist())
    return found


def trained(engine: MegatronEngine, generation: Generation) -> Tensor:
    """The trainer's log-probabilities of a generation."""
    batch = TokenBatch(generation.tokens_BT, generation.response_mask_BT, kept=generation.kept)
    return engine.logprobs(batch, "policy")


def assert_one_distribution(setup: Setup) -> None:
    """Greedy tokens are ours, and sampled tokens have the trainer's log-probabilities."""
    greedy = setup.rollouts.generate(setup.prompts, GREEDY, 1)
    assert responses(greedy) == responses(setup.engine.generator.generate(setup.prompts, GREEDY, 1))
    sampling = SamplingParameters(12, temperature=0.7, repetition_penalty=1.2)
    sampled = setup.rollouts.generate(setup.prompts, sampling, 5)
    assert sampled.versions_B is not None and set(sampled.versions_B.tolist()) == {setup.engine.changes}
    torch.testing.assert_close(sampled.logprobs_BT, trained(setup.engine, sampled), atol=CLOSE, rtol=0)
    cut = SamplingParameters(12, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2)
    kept = setup.rollouts.generate(setup.prompts, cut, 5)
    assert kept.kept is not None
    counts_N = kept.kept.counts_BT[kept.response_mask_BT]
    assert int(counts_N.min()) >= 1 and int(counts_N.max()) <= 20 and len(counts_N.unique()) > 1
    torch.testing.assert_close(kept.logprobs_BT, trained(setup.engine, kept), atol=CLOSE, rtol=0)
    texts = responses(sampled)
    assert texts[2] != texts[4], "samples of one prompt differ"


def test_tokens_and_log_probabilities_are_ours_before_and_after_an_update(tiny: Setup) -> None:
    engine, rollouts = tiny.engine, tiny.rollouts
    rollouts.update_weights()
    assert_one_distribution(tiny)
    assert responses(rollouts.generate(tiny.prompts, GREEDY, 1)) == of_transformers(
        tiny.directory, tiny.prompts, 2
    )
    before = rollouts.generate(tiny.prompts, GREEDY, 1)
    batch = check_engine.local_part(check_engine.global_batch(200), engine)
    report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo"))
    assert not report.skipped
    rollouts.update_weights()
    after = rollouts.generate(tiny.prompts, GREEDY, 1)
    assert not torch.equal(before.logprobs_BT, after.logprobs_BT)  # nothing of the old prefixes is cached
    assert_one_distribution(tiny)


def test_weights_after_updates_are_bit_by_bit_those_that_vllm_loads_itself(tiny: Setup) -> None:
    """vLLM keeps packed copies of matrices on CPUs, so the outputs tell; bitwise, as kernels are the same."""
    engine = tiny.engine
    for chunk in engine.policy.modules:
        weights.load(chunk, engine.shape, tiny.directory)
    engine._other_changes += 1
    tiny.rollouts.update_weights()
    assert_same_bits(one_by_one(tiny.rollouts, tiny.prompts), tiny.loaded)


def assert_trained_values_are_sent(setup: Setup, vocabulary: int, folder: Path) -> None:
    """After an update, a server that reads the export answers bit by bit as the one that was sent weights."""
    engine, rollouts = setup.engine, setup.rollouts
    rollouts.update_weights()
    before = one_by_one(rollouts, setup.prompts)
    batch = check_engine.local_part(check_engine.global_batch(vocabulary), engine)
    assert not engine.update_policy(batch, check_engine.loss, aggregation.build("gapo")).skipped
    rollouts.update_weights()
    sent = one_by_one(rollouts, setup.prompts)
    assert not torch.equal(before[0].logprobs_BT, sent[0].logprobs_BT)
    engine.export_hf(folder / "hf")
    policy = replace(rollouts.policy, companions=folder / "hf")
    fresh = Vllm(policy, rollouts.config)
    try:
        loaded = before_any_update(fresh, setup.prompts)
    finally:
        fresh.close()
    assert_same_bits(sent, loaded)


def test_trained_weights_are_bit_by_bit_those_of_their_export(tiny: Setup, tmp_path: Path) -> None:
    assert_trained_values_are_sent(tiny, 200, tmp_path)


def test_more_prompts_at_once_than_a_batch_of_vllm_holds(tiny: Setup) -> None:
    """2,048 tokens: the others wait, whole."""
    tiny.rollouts.update_weights()
    prompts = [tiny.prompts[3]] * 128
    sampling = SamplingParameters(4, temperature=0.7, repetition_penalty=1.2)
    sampled = tiny.rollouts.generate(prompts, sampling, 5)
    torch.testing.assert_close(sampled.logprobs_BT, trained(tiny.engine, sampled), atol=CLOSE, rtol=0)
    assert len(set(map(tuple, responses(sampled)))) > 64, "samples of one prompt differ"


def test_a_killed_server_costs_a_repetition_and_nothing_else(tiny: Setup) -> None:
    rollouts = tiny.rollouts
    rollouts.update_weights()
    sampling = SamplingParameters(90, temperature=0.7, repetition_penalty=1.2)
    undisturbed = rollouts.generate(tiny.prompts, sampling, 5)
    (process,) = rollouts._processes
    assert process._process is not None
    starts = process.starts
    killer = threading.Timer(0.2, os.kill, (process._process.pid, signal.SIGKILL))

    def ask() -> Generation:
        if process.starts == starts:
            killer.start()
        return rollouts.generate(tiny.prompts, sampling, 5)

    again = recovered(tiny.engine, rollouts.update_weights, ask)
    assert process.starts == starts + 1
    assert responses(undisturbed) == responses(again)
    torch.testing.assert_close(undisturbed.logprobs_BT, again.logprobs_BT, atol=CLOSE, rtol=0)


@pytest.mark.skipif(not (SMOLLM / "config.json").is_file(), reason=f"no model in {SMOLLM}")
def test_a_real_model_s_tokens_and_log_probabilities_are_ours(tmp_path: Path) -> None:
    built = set_up(SMOLLM.resolve(), 49152, 2, lr=0.01)
    try:
        built.rollouts.update_weights()
        assert_one_distribution(built)
        assert_trained_values_are_sent(built, 49152, tmp_path)
    finally:
        built.rollouts.close()
        worlds.leave()


def test_log_probabilities_in_bf16_are_the_trainer_s_up_to_rounding(tmp_path: Path) -> None:
    tiny_llama(tmp_path, head_dim=64)
    built = set_up(tmp_path, 200, 2, dtype="bf16")
    try:
        built.rollouts.update_weights()
        sampling = SamplingParameters(24, temperature=0.7, repetition_penalty=1.2)
        sampled = built.rollouts.generate(built.prompts, sampling, 5)
        mask_BT = sampled.response_mask_BT
        difference_N = (sampled.logprobs_BT - trained(built.engine, sampled))[mask_BT].abs()
        mean, most = float(difference_N.mean()), float(difference_N.max())
        print(f"bf16: mean {mean:.5f}, max {most:.5f} over {len(difference_N)} tokens")
        assert 0 < mean < BF16_CLOSE
    finally:
        built.rollouts.close()
        worlds.leave()
