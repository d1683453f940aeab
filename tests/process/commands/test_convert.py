"""The convert command: processes that share the writing, and the scripts that Megatron users look for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from gapo_mega.engine.megatron.checkpoint.dist_format import DistReader
from tests.helpers.commands import run
from tests.helpers.hf_directories import assert_same_model, language_model
from tests.helpers.tiny import tiny_llama

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def python(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)


def test_processes_share_the_writing_of_a_checkpoint(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    done = run("convert", "--from", source, "--to", tmp_path / "shared", "--tp", 2, "--nproc", 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("wrote") == 1
    files = {file.name: file.stat().st_size for file in (tmp_path / "shared").glob("*.distcp")}
    assert len(files) == 2 and min(files.values()) > 0.4 * max(files.values())  # each wrote its part
    alone = python(
        str(TOOLS / "convert_hf_to_megatron.py"), "--from", str(source), "--to", str(tmp_path / "one")
    )
    assert alone.returncode == 0, alone.stderr[-4000:]
    shared, one = DistReader(tmp_path / "shared"), DistReader(tmp_path / "one")
    assert shared.tensors.keys() == one.tensors.keys() and shared.objects == one.objects
    for key in one.tensors:
        rows = min(one.tensors[key].size[0], shared.tensors[key].size[0])  # the vocabulary's padding differs
        assert torch.equal(shared.read(key)[:rows], one.read(key)[:rows]), key
    arguments = ["--from", str(tmp_path / "shared"), "--to", str(tmp_path / "back")]
    back = python(str(TOOLS / "convert_megatron_to_hf.py"), *arguments)
    assert back.returncode == 0, back.stderr[-4000:]
    assert_same_model(tmp_path / "back", source)


def test_a_refusal_reaches_every_process_and_leaves_nothing(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "hf")
    (tmp_path / "occupied").touch()
    target = str(tmp_path / "occupied" / "ckpt")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "gapo_mega.cli", "convert", "--from", str(tmp_path / "hf"), "--to", target]
    done = python(*torchrun, *command)
    assert done.returncode != 0
    assert done.stderr.count("occupied") >= 2 and "cannot be written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "occupied"]
