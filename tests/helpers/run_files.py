"""The YAML file of a run with a tiny model."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

CONFIG = """
output_dir: {output}
model: {{path: {model}}}
data: {{source: "package:prompts", max_prompt_tokens: 64}}
rollout: {{max_new_tokens: 16}}
objectives:
  - {{name: concise, function: "gapo_mega.demo.rewards:concise"}}
  - {{name: plain, function: "gapo_mega.demo.rewards:plain"}}
"""


def write_run_file(directory: Path) -> Path:
    """``run.yaml`` in ``directory``, and the model that it names."""
    tiny_llama(directory / "model")
    byte_tokenizer(directory / "model", CHAT_TEMPLATE)
    path = directory / "run.yaml"
    path.write_text(CONFIG.format(output=directory / "run", model=directory / "model"))
    return path
