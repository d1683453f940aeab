"""The resolved run: what preflight finds out, and what it refuses before anything is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import Config, DataConfig
from gapo_mega.runs.preflight import preview, resolve
from gapo_mega.scalarization.safe import SafeWeights
from tests.helpers.tiny import byte_tokenizer, safe_rlhf_model, tiny_llama, tiny_mistral, tiny_mixtral

SEQUENCE = {"tensor": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of 4 layers; backbones that fit it and that do not."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(folder / "policy")
    tiny_llama(folder / "tied", tied=True, seed=1)
    tiny_llama(folder / "frequencies", rope_theta=500000.0)
    tiny_llama(folder / "words", vocab=300)
    tiny_llama(folder / "short", max_position_embeddings=16)
    tiny_mistral(folder / "small")
    tiny_mixtral(folder / "experts")
    tiny_llama(folder / "weightless")
    (folder / "weightless" / "model.safetensors").unlink()
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    safe_rlhf_model(folder / "cost")
    byte_tokenizer(folder / "cost")
    for name, vocab in (("exact", 101), ("roomy", 128), ("tight", 100)):
        tiny_llama(folder / name, vocab=vocab)
        byte_tokenizer(folder / name)
    return folder


def configuration(models: Path, **sections: Any) -> Config:
    config: dict[str, Any] = {
        "output_dir": "unused",
        "steps": 3,
        "micro_batch_size": 2,
        "model": {"path": str(models / "policy")},
        "data": {"source": "unused", "max_prompt_tokens": 20},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8},
        "objectives": [{"name": "plain", "function": "gapo_mega.demo.rewards:plain"}],
        "algorithm": {"ppo_epochs": 2, "minibatches": 2},
    }
    return Config.model_validate({**config, **sections})


def test_facts_of_a_run(models: Path) -> None:
    resolved = resolve(configuration(models, parallel={"tensor": 2}), 4)
    assert (resolved.world, resolved.data) == (4, 2)
    assert (resolved.shape.num_layers, resolved.shape.vocab) == (4, 200)
    assert [objective.name for objective in resolved.objectives] == ["plain"]
    assert (resolved.updates_per_step, resolved.total_updates) == (4, 12)
    assert resolved.estimator.name == "group" and resolved.critic is None
    assert resolved.aggregator.name == "gapo"
    assert resolved.policy.directory() == models / "policy"


def test_score_models_come_with_their_shapes(models: Path) -> None:
    cost: dict[str, Any] = {
        "name": "cost",
        "kind": "megatron_score",
        "options": {"model": str(models / "cost")},
    }
    cost["options"] |= {"chat_template": "{{ messages[-1].content }}"}
    (found,) = resolve(configuration(models, objectives=[cost]), 1).score_models
    assert found.request.path == str(models / "cost") and found.shape.vocab == 101


@pytest.mark.parametrize("parallel", [{"expert": 2}, {**SEQUENCE, "expert": 2, "expert_tensor": 1}])
def test_a_score_model_without_experts_beside_a_policy_that_has_them(
    models: Path, parallel: dict[str, Any]
) -> None:
    options = {"model": str(models / "cost"), "chat_template": "{{ messages[-1].content }}"}
    objectives = [{"name": "cost", "kind": "megatron_score", "options": options}]
    policy = {"path": str(models / "experts")}
    resolved = resolve(configuration(models, model=policy, objectives=objectives, parallel=parallel), 2)
    assert resolved.shape.experts is not None and resolved.score_models[0].shape.experts is None
    # A policy that shares experts has some.
    with pytest.raises(ValueError, match=r"^parallel\.expert: found 2, accepted for a model without experts"):
        resolve(configuration(models, parallel=parallel), 2)


def test_a_policy_without_a_row_for_every_token(models: Path) -> None:
    for fitting in ("exact", "roomy"):
        resolve(configuration(models, model={"path": str(models / fitting)}), 1)
    with pytest.raises(
        ValueError, match=r"^model\.path: .*tight has the token .* with the id 100, accepted: "
    ):
        resolve(configuration(models, model={"path": str(models / "tight")}), 1)


def test_a_score_model_without_a_row_for_every_token(models: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(models / "cost", tmp_path / "cost")
    options = {"model": str(directory), "chat_template": "{{ messages[-1].content }}"}
    objectives = [{"name": "cost", "kind": "megatron_score", "options": options}]
    resolve(configuration(models, objectives=objectives), 1)
    (directory / "added_tokens.json").write_text('{"<new>": 101}')
    with pytest.raises(
        ValueError, match=r"'cost': options: model: .*'<new>' with the id 101, accepted: 0 to"
    ):
        resolve(configuration(models, objectives=objectives), 1)


def test_a_score_model_is_no_policy(models: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^model\.path: found the score model LlamaModelForScore, accepted: a la"
    ):
        resolve(configuration(models, model={"path": str(models / "cost")}), 1)


@pytest.mark.parametrize("path", [None, "policy", "tied"])
def test_a_critic_of_the_policys_shape(models: Path, path: str | None) -> None:
    """An output layer is not part of a value model, so it may be tied or not."""
    critic = {"path": path and str(models / path)}
    resolved = resolve(configuration(models, advantages={"name": "gae"}, critic=critic), 1)
    assert resolved.critic is not None
    assert resolved.critic.directory() == models / (path or "policy")
    assert resolved.critic.shape == resolved.shape


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("weightless", r"^critic\.path: .*weightless has neither model\.safetensors nor"),
        ("other", r"^critic\.path: found model_type 'gpt2', accepted: .*llama"),
        ("nowhere", r"^critic\.path: found '.*nowhere', accepted: a Hugging Face directory"),
        ("small", r"^critic\.path: found .*small with num_layers 2, accepted: .* with num_layers 4"),
        ("words", r"^critic\.path: found .*words with vocab 300, accepted: .* with vocab 200"),
        # Tensors of the same sizes: loaded, this one would compute with the policy's frequencies.
        (
            "frequencies",
            r"^critic\.path: found .* with rope_theta 500000\.0, accepted: .* rope_theta 10000\.0",
        ),
        (
            "short",
            r"^critic\.path: found .*short for sequences of at most 16 tokens, accepted: one for the 28",
        ),
    ],
)
def test_a_critic_that_does_not_fit(models: Path, path: str, message: str) -> None:
    config = configuration(models, advantages={"name": "gae"}, critic={"path": str(models / path)})
    with pytest.raises(ValueError, match=message):
        resolve(config, 1)


def test_a_critic_that_nobody_needs_is_not_looked_at(models: Path) -> None:
    assert resolve(configuration(models, critic={"path": "/nowhere"}), 1).critic is None


LOSSES = """
import torch
from gapo_mega.losses.base import PolicyLoss

class Detached(PolicyLoss):
    def __call__(self, logprobs_BT, batch, objective):
        return logprobs_BT.detach().sum()

class PerToken(PolicyLoss):
    def __call__(self, logprobs_BT, batch, objective):
        return logprobs_BT * batch.returns_MBT[objective]

class Nothing(PolicyLoss):
    def __call__(self, logprobs_BT, batch, objective):
        pass
"""


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Detached", r"shape \[\] without a graph"),
        ("PerToken", r"shape \[2, 4\]"),
        ("Nothing", "NoneType"),
    ],
)
def test_a_loss_that_cannot_be_trained_on(models: Path, tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "losses.py").write_text(LOSSES)
    config = configuration(models, loss={"name": f"{tmp_path / 'losses.py'}:{name}"})
    with pytest.raises(
        ValueError, match=rf"^loss\.name: found .*:{name}, which gives {found}, accepted: a loss"
    ):
        resolve(config, 1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"loss": {"options": {"clip_epsilon": -1.0}}}, r"^loss\.options \(ppo\): clip_epsilon: found -1\.0"),
        ({"aggregation": {"options": {"p": -1.0}}}, r"^aggregation\.options \(gapo\): p: found -1\.0"),
        (
            {"advantages": {"options": {"baseline": "x"}}},
            r"^advantages\.options \(group\): baseline: found 'x'",
        ),
        (
            {"aggregation": {"name": "p_gapo", "options": {"preference": [0.5, 0.5]}}},
            r"^aggregation\.options \(p_gapo\): preference: found 2 numbers, accepted: one for each of the 1 "
            "objectives$",
        ),
        (
            {
                "aggregation": {"name": "p_gapo", "options": {"preference": [1.0]}},
                "algorithm": {"kl": "objective"},
            },
            r"^aggregation\.options \(p_gapo\): preference: found 1 numbers, accepted: one for each of the 2 "
            "objectives; algorithm.kl objective has the rows [a-z]+, kl$",
        ),
        (
            {"aggregation": {"name": "gdpo"}},
            r"^aggregation\.name: found gdpo, which is a scalarizer; accepted: scalarization\.name gdpo, or "
            "method=gdpo in place of both sections$",
        ),
        (
            {"scalarization": {"name": "gapo"}},
            r"^scalarization\.name: found gapo, which is an aggregator; accepted: aggregation\.name gapo",
        ),
    ],
)
def test_a_wrong_option_is_told_with_its_section(models: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(configuration(models, **section), 1)


def test_a_plan_takes_packaged_cards_and_a_run_does_not(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"policy": "mistralai/Mistral-7B-v0.1", "cost": "PKU-Alignment/beaver-7b-v1.0-cost"}
    cost = {"name": "cost", "kind": "megatron_score", "options": {"model": names["cost"]}}
    config = configuration(models, model={"path": names["policy"]}, objectives=[cost])
    resolved = resolve(config, 2, shapes_only=True)
    assert (resolved.shape.hidden, resolved.shape.num_layers) == (4096, 32)
    assert resolved.score_models[0].shape.vocab == 32001
    assert {key: card.name for key, card in resolved.cards.items()} == {
        "model.path": names["policy"],
        "objective 'cost': options: model": names["cost"],
    }
    (line,) = preview(config.model_copy(update={"data": DataConfig(source="a.jsonl")}), shapes_only=True)
    assert "not checked, since the tokenizer of mistralai/Mistral-7B-v0.1 is not on this machine" in line
    with pytest.raises(ValueError, match=r"^model\.path: found 'mistralai/Mistral-7B-v0.1', accepted"):
        resolve(config, 2)
    with pytest.raises(ValueError, match=r"^model\.path: found 'mistralai/other', accepted"):
        resolve(configuration(models, model={"path": "mistralai/other"}), 2, shapes_only=True)
    # What is here is read, in a plan too.
    assert not resolve(configuration(models), 1, shapes_only=True).cards


def test_a_scalarizer_is_asked_before_the_run(models: Path) -> None:
    """Its objectives' names, samples and critic; it then has one gradient of weight 1."""
    two = [{"name": n, "function": "gapo_mega.demo.rewards:plain"} for n in ("plain", "harmless")]
    safe = {"name": "safe_rlhf", "options": {"costs": ["harmless"]}}
    resolved = resolve(configuration(models, objectives=two, scalarization=safe), 1)
    assert resolved.scalarizer is not None and resolved.aggregator.name == "weighted_sum"
    refused: list[tuple[dict[str, Any], str]] = [
        (
            {"scalarization": {"name": "safe_rlhf", "options": {"costs": ["harmles"]}}},
            r"^scalarization\.options \(safe_rlhf\): costs: found 'harmles' \(did you mean 'harmless'\?\)",
        ),
        (
            {"scalarization": {"name": "gdpo", "options": {"weights": [1, 2, 3]}}},
            r"^scalarization\.options \(gdpo\): weights: found 3 numbers, accepted: one for each of the 2",
        ),
        (
            {"scalarization": {"name": "gdpo"}, "advantages": {"name": "gae"}},
            r"^advantages\.name: found gae with scalarization\.name gdpo, accepted: an estimator without",
        ),
        (
            {"scalarization": {"name": "morlhf"}, "advantages": {"name": "remax"}},
            r"^advantages\.name: found remax with scalarization\.name morlhf, accepted: an estimator wi",
        ),
        (
            {
                "scalarization": {"name": "gdpo"},
                "advantages": {"name": "gae"},
                "rollout": {"prompts_per_step": 8, "samples_per_prompt": 1, "max_new_tokens": 8},
            },
            r"^rollout\.samples_per_prompt: found 1, accepted with scalarization\.name gdpo: 2 or more",
        ),
    ]
    for sections, said in refused:
        with pytest.raises(ValueError, match=said):
            resolve(configuration(models, objectives=two, **sections), 1)
    critic = configuration(models, objectives=two, scalarization=safe, advantages={"name": "gae"})
    assert resolve(critic, 1).value_heads == 2


def test_a_method_that_looks_at_scores_has_them_of_every_row(models: Path) -> None:
    adaptive = {"name": "gapo", "options": {"rates": "adaptive"}}
    for kl in ("reward", "loss", "apart"):
        resolve(configuration(models, aggregation=adaptive, algorithm={"kl": kl}), 1)
    with pytest.raises(
        ValueError, match=r"^algorithm\.kl: found objective with .*accepted: reward, loss, apart"
    ):
        resolve(configuration(models, aggregation=adaptive, algorithm={"kl": "objective"}), 1)


OWN_SCALARIZERS = """
import torch
from gapo_mega.scalarization.base import Scalarizer, Weighted

class NoGives(Scalarizer):
    def __call__(self, scores_MB, group_B, lengths_B):
        return scores_MB.double().mean(dim=0)

class Reward(NoGives):
    gives = "reward"

class ThreeNumbers(Weighted):
    def coefficients(self, scores_MB, group_B, lengths_B):
        return torch.ones(3)

class Single(Weighted):
    def coefficients(self, scores_MB, group_B, lengths_B):
        return torch.ones(len(scores_MB))  # float32
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NoGives", "whose class attribute gives is None; accepted: rewards, advantages$"),
        ("Reward", "whose class attribute gives is 'reward'; accepted: rewards, advantages$"),
        ("ThreeNumbers", r"whose coefficients are shape \[3\], accepted: .* here \[2\]$"),
    ],
)
def test_a_scalarizer_of_ones_own_keeps_the_contract(
    models: Path, tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "own.py").write_text(OWN_SCALARIZERS)
    two = [{"name": n, "function": "gapo_mega.demo.rewards:plain"} for n in ("plain", "harmless")]

    def run(name: str) -> Config:
        return configuration(models, objectives=two, scalarization={"name": f"{tmp_path}/own.py:{name}"})

    with pytest.raises(ValueError, match=rf"^scalarization\.name: found .*{name}, {said}"):
        resolve(run(name), 1)
    assert resolve(run("Single"), 1).scalarizer is not None


def test_a_safe_scalarizer_gives_the_aggregation_its_weights(models: Path, tmp_path: Path) -> None:
    two = [{"name": n, "function": "gapo_mega.demo.rewards:plain"} for n in ("plain", "harmless")]

    def run(name: str, **sections: Any) -> Config:
        safe = {"name": name, "options": {"safe": True}}
        return configuration(models, objectives=two, **({"scalarization": safe} | sections))

    resolved = resolve(run("safe_rlhf"), 1)
    assert isinstance(resolved.aggregator, SafeWeights) and resolved.scalarizer is not None
    # Two objectives from one forward; m backwards where passes are separate.
    assert (resolved.forward, resolved.passes.backwards) == ("one_pass", 1)
    separate = resolve(run("fast_rl", gradients={"forward": "separate"}), 1)
    assert (separate.passes.forwards, separate.passes.backwards) == (2, 2)
    for estimator in ("gae", "remax", "grpo"):  # greedy responses have scores of every objective
        resolve(run("morlhf", advantages={"name": estimator}), 1)
    with pytest.raises(ValueError, match=r"^scalarization\.options\.safe: found true with gdpo, which"):
        resolve(run("gdpo"), 1)
    (tmp_path / "always.py").write_text(ALWAYS_SAFE)
    own = {"name": f"{tmp_path}/always.py:Always", "options": {}}
    with pytest.raises(ValueError, match=r"^scalarization\.options\.safe: found True in the scalarizer "):
        resolve(run("", scalarization=own), 1)


ALWAYS_SAFE = """
import torch
from dataclasses import dataclass
from gapo_mega.scalarization.base import Weighted

@dataclass(kw_only=True)
class Always(Weighted):
    safe: bool = True
    def coefficients(self, scores_MB, group_B, lengths_B):
        return torch.ones(len(scores_MB))
"""


def test_a_back_end_is_found_and_asked_before_anything_is_built(models: Path, tmp_path: Path) -> None:
    resolve(configuration(models, rollout={"backend": "vllm", "vllm": {"url": "http://localhost:1"}}), 1)
    with pytest.raises(ValueError, match=r"^rollout.vllm: found neither of python and url"):
        resolve(configuration(models, rollout={"backend": "vllm"}), 1)
    with pytest.raises(ValueError, match=r"^rollout.backend: found 'sglang' \(did you mean"):
        resolve(configuration(models, rollout={"backend": "sglang"}), 1)
    (tmp_path / "own.py").write_text("class Own: pass\n")
    with pytest.raises(ValueError, match=r"rollout.backend: .*own.py:Own"):
        resolve(configuration(models, rollout={"backend": f"{tmp_path}/own.py:Own"}), 1)
