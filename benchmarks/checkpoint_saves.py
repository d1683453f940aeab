"""How long a checkpoint holds training up, written at once and in the background.

``python benchmarks/checkpoint_saves.py --model DIRECTORY [--layers N] [--rounds K]`` trains the first N
layers of a model on made-up tokens, takes the two kinds of save in turns, and prints the least seconds of a
step, of a step while files are written, and of what a save holds the training up.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gapo_mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from gapo_mega.engine.base import SupervisedEngine, SupervisedSetup, build_chat_engine
from gapo_mega.models import shape_of
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.runs.checkpoints import CheckpointFolder
from gapo_mega.runs.saves import Saves
from gapo_mega.scratch import size_of
from gapo_mega.types import TokenBatch


def engine_of(model: Path, layers: int) -> SupervisedEngine:
    """The first ``layers`` of a model, with Adam in fp32."""
    shape = dataclasses.replace(shape_of(read_config(model)), num_layers=layers)
    setup = SupervisedSetup(
        shape=shape,
        source=model,
        model=ModelConfig(path=str(model), dtype="fp32"),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-5),
        total_steps=1000,
        micro_batch=1,
        seed=1,
        config={"num_hidden_layers": layers},
    )
    return build_chat_engine(setup)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measured(engine: SupervisedEngine, tokens: int, rounds: int, directory: Path) -> dict[str, float]:
    """Least seconds by name, and the bytes of a checkpoint."""
    learned_BT = torch.arange(tokens).view(1, -1) > 0  # nothing foretells the first one
    batch = TokenBatch(torch.randint(1000, (1, tokens)), learned_BT)
    found: dict[str, float] = {}

    def note(name: str, seconds: float) -> None:
        found[name] = min(seconds, found.get(name, seconds))

    def step() -> None:
        engine.update(batch)

    folder = CheckpointFolder(directory, 1, engine.layout, engine.barrier)
    at_once, background = Saves(folder, engine, False), Saves(folder, engine, True)
    step()  # makes the optimizer's state
    for number in range(rounds):
        note("a step", seconds_of(step))
        note("held up, at once", seconds_of(partial(at_once.save, 2 * number + 1, {}, {}, ())))
        held = seconds_of(partial(background.save, 2 * number + 2, {}, {}, ()))
        started = time.perf_counter()
        while background.under_way is not None:
            note("a step while files are written", seconds_of(step))
            looked = seconds_of(background.look)
        note("until it is complete", held + time.perf_counter() - started)
        note("held up, in the background", held + looked)
    found["bytes"] = size_of(folder.path(2 * rounds))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    engine = engine_of(options.model, options.layers)
    with tempfile.TemporaryDirectory(dir=".") as directory:
        found = measured(engine, options.tokens, options.rounds, Path(directory) / "checkpoints")
    size = found.pop("bytes")
    print(f"{options.layers} layers of {options.model.name}, fp32: {size / 1e9:.2f} GB")
    for name, seconds in found.items():
        print(f"{name:<32} {seconds:7.2f} s")
    print(f"ratio of holding up {found['held up, at once'] / found['held up, in the background']:.2f}")
    engine.close()


if __name__ == "__main__":
    main()
