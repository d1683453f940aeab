"""A run whose aggregator, loss, estimator, objective kind and reward are in a file of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.commands import run
from tests.helpers.tiny import tiny_chat_model

# Such that what a run logs tells which parts were used: losses -5 and -10, weights 1/4 and 3/4, reward 7.
MINE = """
from dataclasses import dataclass, replace

import torch

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.aggregation.on_host import HostMethod, Solution
from gapo_mega.losses.base import PolicyLoss
from gapo_mega.objectives.base import ObjectiveKind


class Quarters(HostMethod):
    def solve(self, gram, active):
        return Solution(torch.tensor([0.25, 0.75], dtype=torch.float64)[list(active)])


class OneAndTwo(AdvantageEstimator):
    needs_values = False

    def __call__(self, experience):
        mask_BT = experience.response_mask_BT
        advantages_MBT = torch.stack([mask_BT * 1.0, mask_BT * 2.0])
        return replace(experience, advantages_MBT=advantages_MBT, returns_MBT=advantages_MBT)


@dataclass(frozen=True, kw_only=True)
class Linear(PolicyLoss):
    factor: float

    def __call__(self, logprobs_BT, batch, objective):
        logprobs_BT = torch.where(batch.response_mask_BT, logprobs_BT, 0.0)
        ratio_BT = (logprobs_BT - logprobs_BT.detach()).exp()
        return -(self.factor * batch.advantages_MBT[objective] * ratio_BT).sum()


class Constant(ObjectiveKind):
    def evaluate(self, prompts, responses):
        return [self.config.options["value"]] * len(responses)


def length(prompts, responses):
    from neighbour import PER_CHARACTER

    return [PER_CHARACTER * len(response) for response in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    folder = tmp_path_factory.mktemp("user code")
    tiny_chat_model(folder / "model", smollm2)
    lines = [json.dumps({"prompt": f"What is {i} plus {7 * i}?"}) for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mine.py").write_text(MINE)
    (folder / "neighbour.py").write_text("PER_CHARACTER = 0.5\n")
    config = {
        "output_dir": str(folder / "run"),
        "steps": 1,
        "micro_batch_size": 4,
        "model": {"path": str(folder / "model")},
        "data": {
            "source": str(folder / "prompts.jsonl"),
            "heldout_prompts": 4,
            "max_prompt_tokens": 60,
            "system_prompt": "Hi.",
        },
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 6},
        "objectives": [
            {"name": "constant", "kind": "mine:Constant", "options": {"value": 7}},
            {"name": "long", "function": "mine.py:length"},
        ],
        "aggregation": {"name": "mine.py:Quarters"},
        "advantages": {"name": "mine.py:OneAndTwo"},
        "loss": {"name": "mine:Linear", "options": {"factor": 5.0}},
        "logging": {"tensorboard": False, "progress": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_two_processes_train_with_a_users_file_from_another_directory(folder: Path, tmp_path: Path) -> None:
    done = run("train", "--config", folder / "run.yaml", "--nproc", 2, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (record,) = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    assert (record["weight/constant"], record["weight/long"]) == (0.25, 0.75)
    # Token means of 5 and 10 in float32.
    assert record["loss/constant"] == pytest.approx(-5, rel=1e-6)
    assert record["loss/long"] == pytest.approx(-10, rel=1e-6)
    assert record["reward/constant"] == 7
    assert record["reward/long"] > 0
    recorded = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    mine = str(folder / "mine.py")
    assert recorded["aggregation"]["name"] == f"{mine}:Quarters"
    assert recorded["loss"] == {"name": f"{mine}:Linear", "options": {"factor": 5.0}}
    assert [o["kind"] for o in recorded["objectives"]] == [f"{mine}:Constant", "python"]
    assert recorded["objectives"][1]["function"] == f"{mine}:length"
    audit = run("audit", folder / "run", cwd=tmp_path)
    assert audit.returncode == 0, audit.stderr
    assert "Quarters" in audit.stdout


def test_what_is_wrong_with_the_file_is_told_before_processes_start(folder: Path, tmp_path: Path) -> None:
    train = ("train", "--config", folder / "run.yaml", "--nproc", 2)
    done = run(*train, "loss.name=mine.py:Lienar", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: loss.name: file {folder / 'mine.py'} has no 'Lienar' (did you mean 'Linear'?)\n"
    )
    (tmp_path / "broken.py").write_text("import torch\nimport no_such_dependency\n")
    done = run(*train, "loss.name=broken.py:Linear", cwd=tmp_path)
    assert done.returncode == 1
    assert f'File "{tmp_path / "broken.py"}", line 2' in done.stderr
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'no_such_dependency'\n")
