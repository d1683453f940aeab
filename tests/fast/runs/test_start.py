"""What a checkpoint remembers of the rows that a run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gapo_mega.config import Config
from gapo_mega.runs.preflight import resolve
from gapo_mega.runs.resume import HELDOUT_ROWS, TRAINING_ROWS
from gapo_mega.runs.start import contents_of
from gapo_mega.types import Prompt
from tests.helpers.small_tokenizers import TEMPLATE, word_tokenizer
from tests.helpers.tiny import tiny_llama


def test_another_answer_in_a_column_is_another_row(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "policy")
    config = Config.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": str(tmp_path / "policy")},
            "data": {"source": "unused", "max_prompt_tokens": 20},
            "rollout": {"max_new_tokens": 8},
            "objectives": [{"name": "plain", "function": "gapo_mega.demo.rewards:plain"}],
        }
    )
    resolved = resolve(config, 1)
    tokenizer: Any = word_tokenizer(chat_template=TEMPLATE)

    def rows(columns: dict[str, Any]) -> tuple[Any, Any]:
        prompts = [Prompt(0, "a", (1, 2), columns=columns)]
        found = contents_of(resolved, tokenizer, prompts, prompts)
        return found[TRAINING_ROWS], found[HELDOUT_ROWS]

    assert rows({"answer": [7]}) == rows({"answer": [7]}) != rows({"answer": [8]})
    assert rows({"answer": "7"}) != rows({"answer": 7}) != rows({})
    assert rows({"a": 1, "b": 2}) == rows({"b": 2, "a": 1})
