"""The vLLM back end above a small server of the same protocol, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.config import Config
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.backends import Policy
from gapo_mega.rollout.backends.vllm import Vllm
from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.types import Generation
from tests.helpers.fake_engine import END, FakeEngine
from tests.helpers.fake_runs import configuration
from tests.helpers.table_policy import VOCABULARY, TablePolicy
from tests.helpers.vllm_protocol import TableServer, cut, table_logprobs, table_server

PROMPTS = [[3, 5], [4], [3, 5], [3, 5]]


def settings(url: str | list[str], tmp_path: Path, **options: Any) -> Config:
    vllm = {"url": url, "patience": 0, "start_timeout": 2, "timeout": 20, "piece_mib": 1, **options}
    return configuration(tmp_path, rollout={"backend": "vllm", "vllm": vllm})


def backend(server: TableServer, tmp_path: Path, engine: FakeEngine, **options: Any) -> Vllm:
    return Vllm(Policy(engine, tmp_path, 0, (END,)), settings(server.url, tmp_path, **options))


@pytest.fixture
def server() -> Iterator[TableServer]:
    with table_server() as running:
        yield running


def expected(engine: TablePolicy, generation: Generation, penalty: float, temperature: float) -> np.ndarray:
    """Log-probabilities of a generation under the policy, from its table in float64."""
    found = np.zeros(tuple(generation.tokens_BT.shape))
    for row, mask_T in enumerate(generation.response_mask_BT):
        tokens = generation.tokens_BT[row].tolist()
        for t in mask_T.nonzero().flatten().tolist():
            found[row, t] = table_logprobs(engine.table.double().numpy(), tokens[:t], penalty, temperature)[
                tokens[t]
            ]
    return found


def test_responses_are_the_policy_s_and_say_so(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    rollouts = backend(server, tmp_path, engine)
    sampling = SamplingParameters(6, temperature=0.7, repetition_penalty=1.3)
    for seed in range(2):
        engine.learn(seed)
        rollouts.update_weights()
        generation = rollouts.generate(PROMPTS, sampling, seed=9)
        np.testing.assert_allclose(
            generation.logprobs_BT.numpy(), expected(engine, generation, 1.3, 0.7), rtol=1e-5, atol=1e-6
        )
        assert generation.versions_B is not None
        assert generation.versions_B.tolist() == [engine.changes] * 4
        for row, prompt in enumerate(PROMPTS):
            assert generation.tokens_BT[row, : len(prompt)].tolist() == prompt
            own = generation.tokens_BT[row][generation.response_mask_BT[row]].tolist()
            assert len(own) == 6 or own[-1] == END
            assert END not in own[:-1] and bool(generation.finished_B[row]) == (own[-1] == END)


@pytest.mark.parametrize(("k", "p"), [(5, 1.0), (5, 0.7), (30, 0.5), (VOCABULARY, 0.9)])
@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
def test_tokens_that_top_k_and_top_p_leave_are_told(
    server: TableServer, tmp_path: Path, k: int, p: float, vocabulary: int | None
) -> None:
    engine = TablePolicy()
    engine.table[:, 7] = engine.table[:, 9]  # ties
    rollouts = Vllm(Policy(engine, tmp_path, 0, (END,), vocabulary), settings(server.url, tmp_path))
    rollouts.update_weights()
    sampling = SamplingParameters(6, temperature=0.7, top_k=k, top_p=p, repetition_penalty=1.3)
    generation = rollouts.generate(PROMPTS, sampling, seed=9)
    assert generation.kept is not None
    counts_BT = generation.kept.counts_BT
    assert torch.equal(counts_BT > 0, generation.response_mask_BT)
    parts = iter(generation.kept.tokens_K.split(counts_BT[generation.response_mask_BT].tolist()))
    for row, mask_T in enumerate(generation.response_mask_BT):
        tokens = generation.tokens_BT[row].tolist()
        for t in mask_T.nonzero().flatten().tolist():
            wanted = cut(table_logprobs(engine.table.double().numpy(), tokens[:t], 1.3, 0.7), k, p)
            assert next(parts).tolist() == np.isfinite(wanted).nonzero()[0].tolist()
            found = float(generation.logprobs_BT[row, t])
            assert found == pytest.approx(wanted[tokens[t]], rel=1e-5, abs=1e-6)
    assert rollouts.generate(PROMPTS, SamplingParameters(6), seed=9).kept is None


def test_more_ties_than_an_answer_shows_are_asked_for(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    engine.table = torch.zeros(VOCABULARY, VOCABULARY)
    engine.table[:, END] = -5.0
    rollouts = Vllm(Policy(engine, tmp_path, 0, (END,), VOCABULARY), settings(server.url, tmp_path))
    rollouts.update_weights()
    generation = rollouts.generate([[4]], SamplingParameters(3, top_k=2), seed=9)
    assert generation.kept is not None
    assert generation.kept.counts_BT.tolist() == [[0, *[VOCABULARY - 1] * 3]]
    assert [sampling["logprobs"] for _, _, sampling in server.asked] == [18, VOCABULARY]


def test_greedy_is_the_likeliest_token_of_temperature_one(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    rollouts = backend(server, tmp_path, engine)
    rollouts.update_weights()
    generation = rollouts.generate([[4]], SamplingParameters(1, temperature=0.0), seed=1)
    wanted = engine.table[4].log_softmax(-1)
    assert int(generation.tokens_BT[0, 1]) == int(wanted.argmax())
    assert float(generation.logprobs_BT[0, 1]) == pytest.approx(float(wanted.max()), rel=1e-5)


def test_a_response_depends_on_seed_and_row_alone(server: TableServer, tmp_path: Path) -> None:
    rollouts = backend(server, tmp_path, TablePolicy())
    rollouts.update_weights()
    sampling = SamplingParameters(8)
    first, again = (rollouts.generate(PROMPTS, sampling, 7) for _ in range(2))
    assert torch.equal(first.tokens_BT, again.tokens_BT)
    other = rollouts.generate(PROMPTS, sampling, 8)
    texts = [tuple(tokens.tolist()) for part in (first, other) for tokens in part.tokens_BT[[0, 2, 3], :10]]
    assert len(set(texts)) == 6  # samples of one prompt, and of two seeds, differ


def test_weights_travel_in_pieces_once_a_change(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    rollouts = backend(server, tmp_path, engine)
    for _ in range(2):
        rollouts.update_weights()
    assert engine.streams == 1
    # 1.6 MB do not fit into a piece of 1 MiB, and go alone.
    assert server.pieces == [["norm", "table"], ["large"], ["last"]]
    taking = ["/update_weights"] * 3
    update = ["/pause?mode=abort", "/start_weight_update", *taking, "/finish_weight_update"]
    assert server.updating() == [
        *update,
        *("/reset_prefix_cache", "/update_weight_version", "/resume"),
    ]
    np.testing.assert_array_equal(server.table, engine.table.double().numpy())
    assert list(tmp_path.iterdir()) == []


def test_weights_of_the_given_directory_are_gone_afterwards(server: TableServer, tmp_path: Path) -> None:
    rollouts = backend(server, tmp_path, TablePolicy(), weights_directory=str(tmp_path))
    seen: list[bool] = []

    def look(path: str, content: Any) -> None:
        if path == "/update_weights":
            seen.append(Path(content["update_info"]["path"]).is_relative_to(tmp_path))

    server.fail = look  # type: ignore[assignment]
    rollouts.update_weights()
    assert seen == [True] * 3 and list(tmp_path.iterdir()) == []


def test_a_server_that_was_restarted_gets_the_weights_and_answers_again(
    server: TableServer, tmp_path: Path
) -> None:
    engine = TablePolicy()
    rollouts = backend(server, tmp_path, engine)
    rollouts.update_weights()
    sampling = SamplingParameters(8)
    undisturbed = rollouts.generate(PROMPTS, sampling, 7)

    def restart(path: str, content: Any) -> None:
        if path == "/inference/v1/generate" and server.generated == 6:  # in the middle of the second rollout
            server.label, server.table = "default", np.zeros((VOCABULARY, VOCABULARY))

    server.fail = restart  # type: ignore[assignment]
    again = recovered(engine, rollouts.update_weights, lambda: rollouts.generate(PROMPTS, sampling, 7))
    assert engine.streams == 2
    assert torch.equal(undisturbed.tokens_BT, again.tokens_BT)
    assert torch.equal(undisturbed.logprobs_BT, again.logprobs_BT)


def test_a_server_that_stays_away_is_named_after_a_bounded_time(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    rollouts = backend(server, tmp_path, engine, start_timeout=0.5)
    rollouts.update_weights()
    server.close()
    with pytest.raises(ServerLost, match=f"{server.url}.*found no answer"):
        rollouts.generate(PROMPTS, SamplingParameters(4), 7)
    with pytest.raises(ServerLost, match=rf"{server.url}: found no healthy vLLM server within 0.5 s"):
        recovered(engine, rollouts.update_weights, lambda: rollouts.generate([[4]], SamplingParameters(4), 7))


@pytest.mark.parametrize(
    ("status", "answer", "kind", "message"),
    [
        (400, {"error": "prompt too long"}, ValueError, "found status 400 and .*prompt too long"),
        (500, {"error": "engine is dead"}, ServerLost, "found status 500 and .*engine is dead"),
        (0, None, ServerLost, "found no answer"),
        (200, {"choices": []}, ServerLost, "accepted: an object with one choice"),
        (200, [1], ServerLost, "accepted: an object with one choice"),
        (200, {"choices": [{"token_ids": [2]}]}, ServerLost, "of the weights without a label"),
    ],
)
def test_an_answer_that_is_none_is_told_with_the_server_s_name(
    server: TableServer, tmp_path: Path, status: int, answer: Any, kind: type[Exception], message: str
) -> None:
    rollouts = backend(server, tmp_path, TablePolicy())
    rollouts.update_weights()
    server.fail = lambda path, content: (status, answer) if "generate" in path else None
    with pytest.raises(kind, match=f"^{server.url}.*{message}") as told:
        rollouts.generate([[4]], SamplingParameters(4), 7)
    assert "\n" not in str(told.value)


def changed(choice: dict[str, Any], **parts: Any) -> tuple[int, Any]:
    return 200, {"choices": [{**choice, **parts}]}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"finish_reason": "abort"}, "ended with 'abort'"),
        ({"token_ids": []}, "without tokens"),
        ({"logprobs": None}, "without log-probabilities"),
        ({"token_ids": [7] * 4}, "log-probabilities of other tokens"),
        ({"token_ids": None}, "without tokens"),
        ({"logprobs": {"content": [None]}}, "without log-probabilities"),
        ({"logprobs": {"content": [{"token_id": 7, "logprob": float("nan")}]}}, "without log-probabilities"),
        ({"logprobs": {"content": [{"token_id": 7, "logprob": -9999.0}]}}, "without log-probabilities"),
        ({"weight_versions": 3}, "of the weights without a label"),
        ({"weight_versions": [{"version": "old"}]}, "of the weights old, accepted: "),
    ],
)
def test_no_half_response_is_taken(
    server: TableServer, tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    rollouts = backend(server, tmp_path, TablePolicy())
    rollouts.update_weights()

    def cut(path: str, content: Any) -> tuple[int, Any] | None:
        if "generate" not in path:
            return None
        _, whole = server.answer(path, content)
        return changed(whole["choices"][0], **parts)

    server.fail = cut
    with pytest.raises(ServerLost, match=message):
        rollouts.generate([[4]], SamplingParameters(4), 7)


def test_an_update_that_fails_in_the_middle_is_an_error_and_the_stream_ends(
    server: TableServer, tmp_path: Path
) -> None:
    engine = TablePolicy()
    rollouts = backend(server, tmp_path, engine)
    tensors: list[str] = []
    stream = engine.named_weights

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream():
            tensors.append(name)
            yield name, tensor

    engine.named_weights = counted  # type: ignore[method-assign]
    server.fail = lambda path, content: (
        (500, {"error": "no such tensor"}) if path == "/update_weights" else None
    )
    with pytest.raises(ServerLost, match=r"update_weights: found status 500 and .*no such tensor"):
        rollouts.update_weights()
    assert tensors == ["norm", "table", "large", "last"]


def test_weights_wait_for_responses_that_are_under_way(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    rollouts = backend(server, tmp_path, engine)
    rollouts.update_weights()
    sampling = SamplingParameters(8)
    before = rollouts.generate(PROMPTS, sampling, 7)
    server.seconds_per_token = 0.02
    asked = rollouts.ask(PROMPTS, sampling, 7)
    engine.learn(1)
    rollouts.update_weights()  # an update drops what is under way
    found = asked.result()
    assert torch.equal(found.tokens_BT, before.tokens_BT) and asked.seconds > 0
    assert found.versions_B is not None and found.versions_B.tolist() == [0] * 4
    assert rollouts.generate(PROMPTS, sampling, 7).versions_B.tolist() == [1] * 4  # type: ignore[union-attr]


def test_several_servers_all_get_the_weights(server: TableServer, tmp_path: Path) -> None:
    engine = TablePolicy()
    with table_server() as second:
        config = settings([server.url, second.url], tmp_path)
        rollouts = Vllm(Policy(engine, tmp_path, 0, (END,)), config)
        rollouts.update_weights()
        assert engine.streams == 1
        np.testing.assert_array_equal(server.table, second.table)
        second.label = "default"  # restarted
        rollouts.update_weights()
        assert engine.streams == 2 and server.label == second.label
        assert server.calls.count("/start_weight_update") == 1


def test_a_rank_with_several_servers_leaves_the_samples_of_a_prompt_to_one(
    server: TableServer, tmp_path: Path
) -> None:
    engine = TablePolicy()
    with table_server() as second:
        both = Vllm(Policy(engine, tmp_path, 0, (END,)), settings([server.url, second.url], tmp_path))
        both.update_weights()
        prompts = [[3, 5], [3, 5], [4], [4], [6], [6]]
        found = both.generate(prompts, SamplingParameters(6), seed=3)
        assert sorted(prompt for _, prompt, _ in server.asked) == [(3, 5), (3, 5), (6,), (6,)]
        assert [prompt for _, prompt, _ in second.asked] == [(4,), (4,)]
    alone = backend(server, tmp_path, engine)
    alone.update_weights()
    assert torch.equal(found.tokens_BT, alone.generate(prompts, SamplingParameters(6), seed=3).tokens_BT)


def test_a_variable_that_is_not_there_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").touch()
    vllm = {"python": str(tmp_path / "python"), "environment": {"HF_TOKEN": "env:MY_TOKEN"}}
    config = configuration(tmp_path, rollout={"backend": "vllm", "vllm": vllm})
    with pytest.raises(ValueError, match=r"^rollout\.vllm\.environment\.HF_TOKEN: found 'env:MY_TOKEN', but"):
        Vllm.check_here(config)
    monkeypatch.setenv("MY_TOKEN", "visible-77e0")
    Vllm.check_here(config)
