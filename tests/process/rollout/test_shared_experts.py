"""A reward that fails on one of the ranks that share experts, beside a score model of experts."""

from __future__ import annotations

from pathlib import Path

import yaml
from transformers import MixtralConfig, MixtralForSequenceClassification

from tests.helpers.commands import run
from tests.helpers.rank_runs import prepare, settings
from tests.helpers.tiny import byte_tokenizer, tiny_mixtral

# Torchrun ends the other rank when the first has ended: it is the one that had only to hear of the failure.
REWARDS = """
import atexit
import os
import time


def fails(prompts, responses):
    if os.environ["RANK"] == "1":
        atexit.register(time.sleep, 60)
        raise ValueError("this answer is not for me")
    return [1.0] * len(responses)
"""


def score_model(folder: Path) -> Path:
    """Of the policy's vocabulary, with experts that the data ranks share as those of the policy."""
    tiny_mixtral(folder, vocab=101)
    config = MixtralConfig.from_pretrained(folder, num_labels=1, pad_token_id=0)
    MixtralForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer(folder, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder


def test_every_rank_ends_with_the_error_of_the_one_that_failed(tmp_path: Path) -> None:
    """Not at the end of ``timeout_minutes``, after the other has waited in the score model."""
    prepare(tmp_path)
    tiny_mixtral(tmp_path / "model", vocab=101)
    byte_tokenizer(tmp_path / "model")
    (tmp_path / "fails.py").write_text(REWARDS)
    options = {"model": str(score_model(tmp_path / "score"))}
    config = settings(tmp_path, "run", 2, parallel={"expert": 2, "timeout_minutes": 10})
    config["objectives"] = [
        {"name": "scored", "kind": "megatron_score", "options": options},
        {"name": "failing", "function": f"{tmp_path / 'fails.py'}:fails"},
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # Within the time that a command may take, which is shorter.
    done = run("train", "--nproc", 2, "--config", "config.yaml", cwd=tmp_path, timeout=500.0)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, done.stderr[-4000:]
    assert all("objective 'failing'" in line and "this answer is not for me" in line for line in errors)
