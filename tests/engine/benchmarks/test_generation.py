"""The benchmark of generation: a tiny run, and an argument that is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from gapo_mega.engine.megatron.runtime import groups
from tests.helpers.tiny import tiny_llama

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "generation.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_generation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_has_every_contender_and_setting(script: ModuleType, tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    before = torch.get_num_threads()
    out = tmp_path / "found" / "r.json"
    arguments = ["--model", str(tmp_path), "--threads", "1", "--new-tokens", "3", "--longest-prompt", "6"]
    arguments += ["--samples", "2", "--out", str(out), "--dtype", "fp32", "--dtype", "bf16"]
    for batches in (["--batch", "5", "--batch", "2"], ["--batch", "3"]):
        done = CliRunner().invoke(script.app, [*arguments, *batches])
        torch.set_num_threads(before)
        assert done.exit_code == 0, done.output
        groups.shutdown()
    found = json.loads(out.read_text())
    settings = {(dtype, 1, batch, 2) for dtype in ("fp32", "bf16") for batch in (5, 2, 3)}
    names = {script.OURS, *script.PEERS}
    records = {(r.contender, r.setting): r for r in script.written(out)}
    assert len(records) == len(found["records"])
    assert set(records) == {(name, setting) for name in names for setting in settings}
    assert len(found["ratios"]) == len(settings)
    for ratio in found["ratios"]:
        setting = (ratio["dtype"], ratio["threads"], ratio["batch"], ratio["samples"])
        speeds = [records[name, setting].tokens_per_cpu_second for name in script.PEERS]
        assert ratio["transformers"] == max(speeds) == records[ratio["best"], setting].tokens_per_cpu_second
        assert ratio["ratio"] == pytest.approx(ratio["gapo_mega"] / ratio["transformers"], abs=0.01)


@pytest.mark.parametrize(("option", "value"), [("--dtype", "fp16"), ("--contender", "flash-dynamic")])
def test_an_unknown_word_is_refused_in_one_line(script: ModuleType, option: str, value: str) -> None:
    arguments = ["--model", "nowhere", "--batch", "1", "--threads", "1", "--dtype", "fp32", option, value]
    done = CliRunner().invoke(script.app, arguments)
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert line.startswith(f"error: {option}: found '{value}', accepted: ")
