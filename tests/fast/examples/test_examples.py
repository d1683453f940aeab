"""The cluster script is Python, and its settings are the paper's."""

from __future__ import annotations

from pathlib import Path

from gapo_mega.config.loading import load

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SCRIPT = EXAMPLES / "gapo_mistral7b.sh"


def test_script_is_valid_python() -> None:
    compile(SCRIPT.read_text(), str(SCRIPT), "exec")


def test_hyper_parameters_are_those_of_the_paper() -> None:
    config = load(EXAMPLES / "gapo_mistral7b.yaml")
    rollout, optimizer, critic = config.rollout, config.optimizer, config.critic.optimizer
    assert (rollout.temperature, rollout.top_p, rollout.repetition_penalty) == (0.7, 1.0, 1.05)
    assert config.data.max_prompt_tokens + rollout.max_new_tokens == 512
    assert (optimizer.lr, critic.lr) == (1e-6, 5e-7)
    for each in (optimizer, critic):
        assert (each.weight_decay, each.schedule, each.warmup_fraction) == (0.0, "cosine", 0.03)
    assert (config.algorithm.kl_beta, config.loss.options["clip_epsilon"]) == (0.05, 0.1)
    assert config.loss.name == "ppo"
    assert (config.model.dtype, config.model.recompute) == ("bf16", "full")
    assert config.micro_batch_size == 16 and rollout.prompts_per_step == 8 * 16 * 8
