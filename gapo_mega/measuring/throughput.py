"""Times of a short training run, by phase, with tokens per second and utilisation.

``gapo-mega benchmark throughput`` prints and writes them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gapo_mega.config import Config
from gapo_mega.evaluation.series import METRICS_FILE
from gapo_mega.measuring.peak import measure_gemm_peak
from gapo_mega.planning import devices
from gapo_mega.planning.flops import mfu
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.planning.speed import Lengths, flops_of
from gapo_mega.rollout.backends import find

WARM_UP_STEPS = 1  # first calls allocate, compile and open connections
FORMULA = (
    "MFU = model FLOPs / (seconds x devices x peak FLOP/s); model FLOPs: rollout with cache, one forward "
    "for the reference (and one for old log-probabilities when recomputed), the forwards and backwards of "
    "the gradient strategy (a backward counts twice), causal attention counted, the output layer at every "
    "token though prompts do without it (an upper bound), recomputation not (HFU counts the policy's); see "
    "gapo_mega/planning/flops.py"
)
BESIDE = (
    "devices are those of the training: the servers that draw responses have others, so the FLOPs of "
    "rollouts are left out, and tokens/s/device would be less if the servers' devices counted"
)


def benchmark_config(config: Config, steps: int, folder: Path) -> Config:
    """``config`` for ``steps`` timed steps: no evaluation, checkpoint or export, a fresh directory."""
    return config.model_copy(
        update={
            "output_dir": str(folder),
            "steps": steps + WARM_UP_STEPS,
            "data": config.data.model_copy(update={"heldout_prompts": 0}),
            "checkpoint": config.checkpoint.model_copy(
                update={"every_steps": 0, "save_final": False, "best": None}
            ),
            "evaluation": config.evaluation.model_copy(
                update={"every_steps": 0, "early_stopping_patience": None}
            ),
            "logging": config.logging.model_copy(
                update={"tensorboard": False, "wandb": False, "loggers": [], "responses": 0}
            ),
        }
    )


def measure(resolved: ResolvedRun) -> dict[str, Any]:
    """Medians over the timed steps of the finished run ``resolved``, from its log. Rank 0 only."""
    config, world = resolved.config, resolved.world
    lines = (Path(config.output_dir) / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    per_step = resolved.updates_per_step
    records = [json.loads(line) for line in lines][WARM_UP_STEPS * per_step :]
    phases, weights = (_medians(records, per_step, prefix) for prefix in ("time/", "weights/"))
    seconds = phases.pop("step")
    tokens = [r["response_length"] + r["prompt_length"] for r in records]
    sequences = config.sequences()
    tokens_per_second = sequences * statistics.mean(tokens) / seconds
    prompt = round(statistics.mean(r["prompt_length"] for r in records))
    response = max(1, round(statistics.mean(r["response_length"] for r in records)))
    flops = flops_of(resolved, Lengths(prompt, response))
    beside = find(config.rollout.backend).answers_beside and not config.rollout.vllm.sleep
    if beside:
        flops = replace(flops, rollout=0)
    peak, peak_source = _peak(torch.bfloat16 if config.model.dtype == "bf16" else torch.float32)
    return {
        "config": config.model_dump(mode="json", exclude={"output_dir"}),
        "device": _device_name(),
        "world_size": world,
        "sequences_per_step": sequences,
        "prompt_tokens_mean": statistics.mean(r["prompt_length"] for r in records),
        "response_tokens_mean": statistics.mean(r["response_length"] for r in records),
        "seconds_per_step": seconds,
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_device": tokens_per_second / world,
        "phases_seconds": phases,
        **{f"weights_{key}_per_step": value for key, value in weights.items()},
        "model_flops_per_step": flops.model,
        "hardware_flops_per_step": flops.hardware,
        "peak_flops_per_device": peak,
        "peak_source": peak_source,
        "mfu": mfu(flops.model, seconds, world, peak),
        "hfu": mfu(flops.hardware, seconds, world, peak),
        "formula": f"{FORMULA}; {BESIDE}" if beside else FORMULA,
        "peak_memory_bytes": max(r["memory/peak_bytes"] for r in records),
    }


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Phases and totals of ``measure`` as a table."""
    table = Table(title=f"throughput on {result['world_size']} x {result['device']}")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for phase, seconds in sorted(result["phases_seconds"].items(), key=lambda item: -item[1]):
        table.add_row(phase, f"{seconds:.3f}", f"{seconds / result['seconds_per_step']:.1%}")
    table.add_section()
    table.add_row("step", f"{result['seconds_per_step']:.3f}", "100.0%")
    console = console or Console()
    console.print(table)
    console.print(
        f"{result['tokens_per_second']:.1f} tokens/s, "
        f"{result['tokens_per_second_per_device']:.1f} tokens/s/device, "
        f"MFU {result['mfu']:.1%}, HFU {result['hfu']:.1%} "
        f"(peak {result['peak_flops_per_device']:.3g} FLOP/s per device: {result['peak_source']})",
        soft_wrap=True,
    )
    if "weights_bytes_per_step" in result:
        size, seconds = result["weights_bytes_per_step"], result["weights_seconds_per_step"]
        console.print(f"weights to servers, a step: {size / 1e6:.1f} MB in {seconds:.3f} s", soft_wrap=True)
    console.print(result["formula"], style="dim", soft_wrap=True)


def _medians(records: Sequence[Mapping[str, Any]], per_step: int, prefix: str) -> dict[str, float]:
    """Medians over steps of what their updates have in sum, of names with ``prefix``, by their rest."""
    steps = [_sums(records[i : i + per_step], prefix) for i in range(0, len(records), per_step)]
    return {key: statistics.median(step.get(key, 0.0) for step in steps) for key in steps[0]}


def _sums(records: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(prefix):
                total[key.removeprefix(prefix)] = total.get(key.removeprefix(prefix), 0.0) + value
    return total


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU process with {torch.get_num_threads()} threads"


def _peak(dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of one device in the type that the model computes in."""
    cuda = torch.cuda.is_available()
    if cuda and dtype == torch.bfloat16:
        known = devices.known(torch.cuda.get_device_name())
        if known is not None:
            return known.peak_flops, "data sheet, dense bf16"
    size = 8192 if cuda else 1024
    name = str(dtype).removeprefix("torch.")
    peak = measure_gemm_peak("cuda" if cuda else "cpu", dtype, size)
    return peak, f"measured: {name} matrix product of size {size}"
