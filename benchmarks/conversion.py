"""Time, peak memory and disk of a whole conversion: Hugging Face -> Megatron -> Hugging Face.

    python benchmarks/conversion.py --config MODEL_DIR_OR_SIZE --folder SCRATCH --out result.json

The model has random bf16 weights (random bits: nothing can be compressed or mistaken) and the shape of
Mistral 7B unless a ``config.json`` says otherwise. Each direction runs in a process of its own, whose peak
resident memory is counted from the moment before the conversion begins; at the end every tensor is compared
bit by bit. A plain copy of the files in the same run tells what the disk allows. The scratch folder needs
three times the model's size and is emptied.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, MistralConfig, PreTrainedConfig

from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.models.huggingface.writing import write_hf
from gapo_mega.models.registry import family_of

# Counted in the child: what this script and its imports hold does not belong to the conversion.
CHILD = """
import json, sys, time
from pathlib import Path
import torch.distributed.checkpoint
from gapo_mega.engine.base import checkpoint_converter

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

direction, source, target = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")
before, started = resident("VmRSS"), time.perf_counter()
getattr(checkpoint_converter(), direction)(Path(source), Path(target))
print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": resident("VmHWM") - before}))
"""


def mistral_7b() -> PreTrainedConfig:
    """The shape of Mistral-7B-v0.3."""
    return MistralConfig(
        vocab_size=32768, sliding_window=None, rope_theta=1e6, architectures=["MistralForCausalLM"]
    )


def promised(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Names, shapes and type of the model's tensors, without data."""
    shape = shape_of(config)
    weights = family_of(config).weight_map(shape)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        tensors = (
            AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(torch.bfloat16).state_dict()
        )
    return {name: tensors[name] for name in sorted(weights.hf_names())}


def random_tensors(like: dict[str, Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Names and random tensors of the shapes of ``like``, the same at every call."""
    for number, (name, tensor) in enumerate(like.items()):
        generator = torch.Generator().manual_seed(seed + number)
        bits = torch.randint(-32768, 32767, tensor.shape, dtype=torch.int16, generator=generator)
        yield name, bits.view(torch.bfloat16)


def run(direction: str, source: Path, target: Path) -> dict[str, Any]:
    """Convert in one direction, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, direction, str(source), str(target)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    result: dict[str, Any] = {**json.loads(done.stdout), "disk_bytes": size}
    print(f"{direction}: {result}", flush=True)
    return result


def seconds_to_copy(source: Path, target: Path) -> float:
    """What the disk allows: ``source``'s files read, written and synced."""
    started = time.perf_counter()
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as reading, (target / path.name).open("wb") as writing:
            while chunk := reading.read(1 << 23):
                writing.write(chunk)
            writing.flush()
            os.fsync(writing.fileno())
    return time.perf_counter() - started


def main() -> None:
    """Make the model, convert it there and back, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="a config.json's directory; none: Mistral 7B's shape")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, made and emptied")
    parser.add_argument("--out", type=Path, default=Path("conversion.json"))
    arguments = parser.parse_args()
    config = (
        mistral_7b()
        if arguments.config is None
        else (AutoConfig.from_pretrained(arguments.config, trust_remote_code=False))
    )
    folder: Path = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    companions = folder / "companions"
    config.save_pretrained(companions)
    like = promised(config)
    size = sum(tensor.nbytes for tensor in like.values())
    write_hf(folder / "hf", companions, like, random_tensors(like, seed=1))
    copying = seconds_to_copy(folder / "hf", folder / "copy")
    shutil.rmtree(folder / "copy")
    there = run("to_checkpoint", folder / "hf", folder / "checkpoint")
    shutil.rmtree(folder / "hf")  # made anew for the comparison
    back = run("to_hf", folder / "checkpoint", folder / "back")
    found = HFDirectory(folder / "back")
    equal = found.names == like.keys() and all(
        torch.equal(found.read(name).view(torch.int16), tensor.view(torch.int16))
        for name, tensor in random_tensors(like, seed=1)
    )
    result = {
        "date": date.today().isoformat(),
        "model": config.model_type,
        "parameters": sum(tensor.numel() for tensor in like.values()),
        "model_bytes": size,
        "largest_tensor_bytes": max(tensor.nbytes for tensor in like.values()),
        "copy_seconds": copying,
        "to_checkpoint": there,
        "to_hf": back,
        "bit_equal": equal,
        "threads": torch.get_num_threads(),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(folder)
    for name, part in (("to_checkpoint", there), ("to_hf", back)):
        share = (part["peak_bytes"] - result["largest_tensor_bytes"]) / size
        print(
            f"{name}: {part['seconds']:.0f} s, {part['seconds'] / copying:.2f} of a copy's time, peak "
            f"{part['peak_bytes'] / 1e9:.2f} GB (largest tensor + {share:.1%} of the model)"
        )
    print(f"bit-equal: {equal}")


if __name__ == "__main__":
    main()
