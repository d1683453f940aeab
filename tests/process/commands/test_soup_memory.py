"""The peak memory of a merge, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.tiny import larger_llama, tiny_llama

MEASURE = """
import sys
from pathlib import Path
from gapo_mega.models.huggingface.soup import write_soup

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

one, other, out, small = map(Path, sys.argv[1:])
write_soup([small, small], [0.5, 0.5], Path(str(small) + "-soup"))  # imports what is imported on first use
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = status("VmRSS")
write_soup([one, other], [0.3, 0.7], out)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_merge_holds_one_tensor_of_every_model(tmp_path: Path) -> None:
    """And of the result; beside them a tenth of one model, at 0.4 GB."""
    config, names = larger_llama()
    for seed, folder in enumerate(("one", "other")):
        torch.manual_seed(seed)
        tensors = {name: torch.rand(shape).bfloat16() for name, shape in names.items()}
        config.save_pretrained(tmp_path / folder)
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(value.nbytes for value in tensors.values())
    largest = max(value.nbytes for value in tensors.values())
    assert size > 4e8
    tiny_llama(tmp_path / "small")
    folders = [str(tmp_path / name) for name in ("one", "other", "out", "small")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed is given back
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, *folders]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    held = int(result.stdout)
    assert held <= 3 * largest + 0.1 * size, f"{held / 1e6:.0f} MB for two models of {size / 1e6:.0f} MB"
