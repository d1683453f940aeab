"""The peak memory of a conversion, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import larger_llama, tiny_llama

MEASURE = """
import resource, sys
from pathlib import Path
from gapo_mega.engine.megatron.checkpoint import convert

def grown(call, *arguments):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = status("VmRSS")
    call(*map(Path, arguments))
    return status("VmHWM") - before

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

source, checkpoint, back, small = sys.argv[1:]
convert.to_checkpoint(Path(small), Path(small + "-ckpt"))  # imports what is imported on first use
convert.to_hf(Path(small + "-ckpt"), Path(small + "-back"))
print(grown(convert.to_checkpoint, source, checkpoint), grown(convert.to_hf, checkpoint, back))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_conversion_holds_a_small_part_of_the_model(tmp_path: Path) -> None:
    """The largest tensor and a fifth of the rest, at 0.4 GB, where Python's own objects still count."""
    config, names = larger_llama()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-9999, 9999, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
        for name, shape in names.items()
    }
    size = sum(value.nbytes for value in tensors.values())
    largest = max(value.nbytes for value in tensors.values())
    assert size > 4e8
    (tmp_path / "hf").mkdir()
    config.save_pretrained(tmp_path / "hf")
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    folders = [str(tmp_path / name) for name in ("hf", "ckpt", "back", "small")]
    tiny_llama(tmp_path / "small")
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, *folders]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed is given back
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    there, back = map(int, result.stdout.split())
    back_again = load_file(tmp_path / "back" / "model.safetensors")
    bits = {name: value.view(torch.int16) for name, value in tensors.items()}  # random bits: some are NaN
    assert all(torch.equal(back_again[name].view(torch.int16), value) for name, value in bits.items())
    assert there <= largest + 0.2 * size, f"{there / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    assert back <= largest + 0.2 * size, f"{back / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
