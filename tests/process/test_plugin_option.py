"""``pytest --plugin``: the contract tests pointed at classes outside the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.environment import ROOT, environment

FAST = ROOT / "tests" / "fast"
CONTRACTS = {
    "aggregation": FAST / "aggregation" / "test_aggregation.py",
    "advantages": FAST / "advantages" / "test_advantages.py",
    "losses": FAST / "losses" / "test_contract.py",
    "objectives": FAST / "objectives" / "test_objectives.py",
    "scalarization": FAST / "scalarization" / "test_contract.py",
}

LOSSES = """
import torch
from gapo_mega.losses.base import PolicyLoss

class Right(PolicyLoss):
    def __call__(self, logprobs_BT, batch, objective):
        logprobs_BT = torch.where(batch.response_mask_BT, logprobs_BT, 0.0)
        advantages_BT = torch.where(batch.response_mask_BT, batch.advantages_MBT[objective], 0.0)
        return -(advantages_BT * logprobs_BT).sum()

class Mean(Right):
    def __call__(self, logprobs_BT, batch, objective):
        return super().__call__(logprobs_BT, batch, objective) / batch.response_mask_BT.sum().clamp(min=1)

class Leaks(PolicyLoss):
    def __call__(self, logprobs_BT, batch, objective):
        return -(batch.advantages_MBT[objective] * logprobs_BT * batch.response_mask_BT).sum()

class Other(Right):
    def __call__(self, logprobs_BT, batch, objective):
        return super().__call__(logprobs_BT, batch, 0)

class Gradient(Right):
    def __call__(self, logprobs_BT, batch, objective):
        value = super().__call__(logprobs_BT, batch, objective)
        return 2 * value - value.detach()
"""


def outcomes(folder: Path, *plugins: str) -> dict[str, set[tuple[str, str]]]:
    """By class: the outcome and name of every test of its contract."""
    kinds = {plugin.partition("=")[0] for plugin in plugins}
    names = [plugin.rpartition(":")[2] for plugin in plugins]
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "-k", " or ".join(names)]
    command += [f"--plugin={plugin}" for plugin in plugins] + [str(CONTRACTS[kind]) for kind in sorted(kinds)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, set[tuple[str, str]]] = {name: set() for name in names}
    for outcome, test, name in re.findall(r"^(PASSED|FAILED) .*::(test_\w+)\[.*:(\w+)", done.stdout, re.M):
        found[name].add((outcome, test))
    return found


def test_the_examples_of_the_page_keep_their_contracts(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        (tmp_path / Path(code.splitlines()[0]).name).write_text(code)
    found = outcomes(tmp_path, *re.findall(r"--plugin (\S+)", page))
    least = {"EqualPower": 15, "BatchMean": 1, "Reinforce": 7, "Words": 1, "Worst": 8}
    assert {name: len(tests) >= least[name] for name, tests in found.items()} == dict.fromkeys(least, True)
    for name, tests in found.items():
        assert {outcome for outcome, _ in tests} == {"PASSED"}, (name, tests)


def test_the_contract_of_losses_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(LOSSES)
    wrong = {
        "Mean": "test_it_adds_up_over_microbatches",
        "Leaks": "test_masked_positions_add_exactly_nothing_whatever_they_hold",
        "Other": "test_it_reads_the_advantages_of_its_objective_only",
        "Gradient": "test_the_gradient_is_that_of_finite_differences",
    }
    found = outcomes(tmp_path, *(f"losses=wrong.py:{name}" for name in ("Right", *wrong)))
    assert {outcome for outcome, _ in found["Right"]} == {"PASSED"}
    for name, test in wrong.items():
        assert ("FAILED", test) in found[name], (name, found[name])


def test_what_is_no_plugin_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--plugin", "loss=x.py:X", str(CONTRACTS["losses"])]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 4
    assert "--plugin: found 'loss=x.py:X', accepted: KIND=path/to/file.py:Class" in done.stderr
