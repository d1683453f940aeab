"""Runs of several ranks, small and quick, for tests that disturb them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

# Of a module beside the configuration: it is read once by every process.
REWARDS = '''
"""Rewards that do what a file beside them says: rank, step and what happens there."""
import os, signal, time
from pathlib import Path

calls = 0


def short(prompts, responses):
    return [-float(len(response)) for response in responses]


def disturbed(prompts, responses):
    """As ``vowels``; the file ``disturb`` has the rank and the call at which to do what, once."""
    global calls
    calls += 1
    disturb = Path(__file__).with_name("disturb")
    if disturb.exists():
        rank, call, what = disturb.read_text().split()
        if os.environ.get("RANK", "0") == rank and calls == int(call):
            disturb.rename(disturb.with_name("disturbed"))
            if what == "sleep":
                time.sleep(3600)
            time.sleep(3)  # until its signs of life say where it is
            os.kill(os.getpid(), getattr(signal, what))
    return [sum(c in "aeiou" for c in response) / (1 + len(response)) for response in responses]
'''


def prepare(folder: Path) -> None:
    """A tiny model with its tokenizer, prompts and rewards in ``folder``."""
    from tests.helpers.tiny import byte_tokenizer, tiny_llama  # only here: it takes seconds to load

    tiny_llama(folder / "model", vocab=101)
    byte_tokenizer(folder / "model")
    lines = [json.dumps({"prompt": f"What is {i} plus {7 * i}?"}) for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "rewards.py").write_text(REWARDS)


def settings(folder: Path, name: str, steps: int, **sections: Any) -> dict[str, Any]:
    """Those of so many quick steps, each with a checkpoint; the run goes to ``folder/name``."""
    config: dict[str, Any] = {
        "output_dir": str(folder / name),
        "steps": steps,
        "micro_batch_size": 4,
        "model": {"path": str(folder / "model")},
        "data": {
            "source": str(folder / "prompts.jsonl"),
            "heldout_prompts": 0,
            "max_prompt_tokens": 60,
            "chat_template": False,
        },
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 4, "batch_size": 16},
        "objectives": [
            {"name": "short", "function": f"{folder / 'rewards.py'}:short"},
            {"name": "vowels", "function": f"{folder / 'rewards.py'}:disturbed"},
        ],
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every_steps": 1},
        "logging": {"tensorboard": False, "progress": False},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def write_config(folder: Path, name: str, steps: int, **sections: Any) -> Path:
    """``settings`` as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, name, steps, **sections)))
    return path


def disturb(folder: Path, rank: int, step: int, what: str) -> None:
    """Let ``rank`` send itself the signal ``what``, or sleep, when it scores step ``step`` (from 1), once."""
    (folder / "disturb").write_text(f"{rank} {step} {what}")


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Raise ``AssertionError`` with ``what`` where it does not hold within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
