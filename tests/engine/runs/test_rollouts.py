"""Real runs in this process whose responses come from a server of the same model, also one step ahead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import Config
from gapo_mega.config.loading import parse
from gapo_mega.runs.start import train
from tests.helpers.here import Here
from tests.helpers.llama_server import LlamaServer
from tests.helpers.metrics_log import VARYING, metrics
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

TIMES = ("rollout/seconds", "rollout/waited", "rollout/overlap", "rollout/weights", "weights/")
CLOCKED = (*VARYING, *TIMES)

REWARDS = """
import os, signal
from pathlib import Path


def vowels(prompts, responses, *, flag):
    path = Path(flag)
    if path.exists():
        left = int(path.read_text()) - 1
        path.write_text(str(left))
        if left == 0:
            path.unlink()
            os.kill(os.getpid(), signal.SIGTERM)
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    tiny_llama(folder / "model")
    byte_tokenizer(folder / "model", CHAT_TEMPLATE)
    rows = [json.dumps({"prompt": f"What is {i} plus {7 * i}?"}) for i in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LlamaServer]:
    running = LlamaServer(folder / "model")
    yield running
    running.close()


def configuration(folder: Path, name: str, url: str, **rollout: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / name),
        "steps": 4,
        "micro_batch_size": 4,
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {"source": str(folder / "prompts.jsonl"), "heldout_prompts": 2, "max_prompt_tokens": 80},
        "rollout": {
            **{"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6, "backend": "vllm"},
            **{"vllm": {"url": url, "patience": 0, "start_timeout": 0.5}, **rollout},
        },
        "objectives": [
            {"name": "short", "function": "tests.helpers.rewards:short"},
            {
                "name": "vowels",
                "function": f"{folder / 'rewards.py'}:vowels",
                "options": {"flag": str(folder / "flag")},
            },
        ],
        "optimizer": {"lr": 1e-3},
        "logging": {"tensorboard": False, "progress": False},
    }


def run(folder: Path, name: str, server: LlamaServer, **rollout: Any) -> tuple[bool, Path]:
    config = configuration(folder, name, server.url, **rollout)
    return train(parse(config, [], Config, "test", folder)), folder / name


def test_responses_are_of_the_trainer_s_distribution_or_of_the_one_a_step_before(
    folder: Path, server: LlamaServer
) -> None:
    _, on_time = run(folder, "on_time", server)
    # fp32 of two implementations: log-probabilities of size 5 agree to 1e-5.
    assert all(line["logprob_difference/max"] < 1e-4 for line in metrics(on_time))
    _, ahead = run(folder, "ahead", server, ahead=1)
    lines = metrics(ahead)
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1]
    first, *others = (line["logprob_difference/max"] for line in lines)
    # An update of Adam moves every parameter by the learning rate, 1e-3.
    assert first < 1e-4 and min(others) > 1e-3
    assert lines[0]["correction/weight"] == pytest.approx(1, abs=1e-5)
    assert all(line["correction/weight"] != pytest.approx(1, abs=1e-5) for line in lines[1:])


def test_stopped_and_resumed_one_step_ahead(folder: Path, server: LlamaServer) -> None:
    whole, undisturbed = run(folder, "whole", server, ahead=1)
    assert whole
    (folder / "flag").write_text("3")  # before training, after the responses of step 1 and of step 2
    finished, stopped = run(folder, "stopped", server, ahead=1)
    assert not finished and len(metrics(stopped)) == 2
    finished, stopped = run(folder, "stopped", server, ahead=1)
    assert finished
    assert metrics(stopped, CLOCKED) == metrics(undisturbed, CLOCKED)
    weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (undisturbed, stopped)]
    assert weights[0] == weights[1]


def test_a_server_that_stays_away_is_one_line_and_an_exit_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "away.json"
    path.write_text(json.dumps(configuration(folder, "away", "http://127.0.0.1:9")))
    code, _, err = Here(monkeypatch, capsys)("train", "--config", str(path))
    assert code == 69
    last = err.strip().splitlines()[-1]
    assert last == "error: http://127.0.0.1:9: found no healthy vLLM server within 0.5 s"
    assert "Traceback" not in err
