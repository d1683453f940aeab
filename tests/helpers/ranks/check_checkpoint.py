"""Save tiny models in one layout and load them in others; continue in the same one bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
    param_is_not_tensor_parallel_duplicate,
)
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from gapo_mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from gapo_mega.engine.megatron.checkpoint.background import BackgroundSave, HeldFiles
from gapo_mega.engine.megatron.model.build import build_chunks
from gapo_mega.engine.megatron.model.forward import forward_backward
from gapo_mega.engine.megatron.model.logprobs import Distribution
from gapo_mega.engine.megatron.model.modules import RMSNorm
from gapo_mega.engine.megatron.model.optimizer import Trainable, make_trainable
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.engine.megatron.runtime.groups import Collective, Groups
from gapo_mega.models.checkpoint_files import measured
from gapo_mega.models.shape import ModelShape
from gapo_mega.types import TokenBatch
from tests.helpers.logits import response_logprobs
from tests.helpers.ranks import worlds

ROWS, COLUMNS, HEADS = 8, 12, 2
STEPS = 3

# Across layouts the same numbers are summed in another order. Of what was loaded the sums are fp64;
# losses after further steps come from fp32 or bf16 (8 bits) arithmetic. The measured differences are
# about 1e-14, 1e-7 and 1e-4; without the optimizer's state the losses differ by more than 1e-2.
SAME_NUMBERS = 1e-12
LOSSES = {"fp32": 2e-6, "bf16": 2e-3}


class Run:
    """A policy and a critic with random weights, and generators that start from ``seed``."""

    def __init__(self, args: dict[str, Any], in_groups: Groups, seed: int, virtual: int = 1) -> None:
        self.groups = in_groups
        layout = in_groups.layout
        with megatron_device():
            model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        torch.manual_seed(seed + layout.rank)
        np.random.seed(seed)
        random.seed(seed)
        self.vocab: int = args.get("vocab", 256)
        shape = ModelShape(
            family="llama", num_layers=args.get("layers", 2), hidden=args.get("hidden", 24), ffn=40,
            heads=4, kv_groups=2, head_dim=6, vocab=self.vocab, tied=args.get("tied", False),
            rope_theta=10000.0, norm_eps=1e-5, qkv_bias=True, max_positions=64,
        )  # fmt: skip
        model = ModelConfig(path="unused", dtype=args.get("dtype", "fp32"))
        parallel = ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, virtual_pipeline=virtual)
        optimizer = OptimizerConfig.model_validate(
            {"lr": 1e-2, "warmup_fraction": 0.2, **args.get("optimizer", {})}
        )
        with megatron_device():
            self.trainables = {
                "policy": make_trainable(build_chunks(shape, model, parallel), optimizer, total_steps=20),
                "critic0": make_trainable(
                    build_chunks(shape, model, parallel, value_heads=HEADS), optimizer, 20
                ),
            }

    def step(self, seed: int) -> float:
        """One update of both models on a batch that is the same in every layout; the sum of the losses."""
        generator = torch.Generator().manual_seed(seed)
        tokens_BT = torch.randint(0, self.vocab, (ROWS, COLUMNS), generator=generator)
        mask_BT = (torch.arange(COLUMNS) >= 4).expand(ROWS, COLUMNS).contiguous()
        part = ROWS // self.groups.layout.data
        rows = slice(self.groups.layout.data_rank * part, (self.groups.layout.data_rank + 1) * part)
        batches = TokenBatch(tokens_BT[rows], mask_BT[rows]).split(1)
        count = float(mask_BT.sum())

        def policy_loss(logits_BTV: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
            logprobs_BT = response_logprobs(logits_BTV, batch, Distribution(self.vocab))
            mean = -logprobs_BT.sum() / count
            return mean, mean

        def critic_loss(values_BTH: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
            target_BT1 = (batch.tokens_BT % 7).unsqueeze(-1).float()
            mean = (values_BTH - target_BT1).square().sum() / count
            return mean, mean

        total = 0.0
        with megatron_device():
            for name, loss in (("policy", policy_loss), ("critic0", critic_loss)):
                trainable = self.trainables[name]
                trainable.zero_grad()
                local = forward_backward(trainable.chunks, batches, loss)
                trainable.step()
                total += float(self.groups.sum_over_data(self.groups.from_last_stage(local)))
        return total

    def random_step(self) -> float:
        """A step whose batch depends on every random-number generator."""
        with megatron_device(), get_cuda_rng_tracker().fork():
            drawn = int(torch.randint(1000, ()))
        drawn += int(torch.randint(1000, ())) + int(np.random.randint(1000)) + random.randrange(1000)
        drawn = self.groups.broadcast_in_replica(drawn)
        return self.step(self.groups.gather_over_data(drawn)[0])

    def tensors(self) -> list[Tensor]:
        """Copies of everything on this rank that a step changes."""
        found: list[Tensor] = []
        for trainable in self.trainables.values():
            trainable.gather_parameters()
            found += [p.detach().clone() for p in trainable.parameters()]
            for state in trainable.optimizer.optimizer.state.values():
                found += [value.clone() for _, value in sorted(state.items())]
            found.append(torch.tensor([group["lr"] for group in trainable.optimizer.param_groups]))
        return found

    def fingerprint(self) -> dict[str, list[float]]:
        """Per parameter and optimizer tensor: [sum, sum of squares, maximum, minimum] over all ranks."""
        local: dict[str, list[float]] = {}
        for prefix, trainable in self.trainables.items():
            trainable.gather_parameters()
            for name, tensor in _own_tensors(trainable, self.groups.layout.data_rank):
                wide = tensor.detach().double()
                local[f"{prefix}.{name}"] = [
                    float(wide.sum()),
                    float(wide.square().sum()),
                    float(wide.max()),
                    float(wide.min()),
                ]
        everyone: list[dict[str, list[float]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, local)
        total: dict[str, list[float]] = {}
        for part in everyone:
            for name, (plain, squares, high, low) in part.items():
                old = total.get(name, [0.0, 0.0, -math.inf, math.inf])
                total[name] = [old[0] + plain, old[1] + squares, max(old[2], high), min(old[3], low)]
        return total


class _StatefulNorm(RMSNorm):
    """A norm with an extra state: Transformer Engine's have one, Megatron's own have not."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0)

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("nothing was stored")


def _give_extra_states(run: Run) -> None:
    for trainable in run.trainables.values():
        norms = [m for chunk in trainable.modules for m in chunk.modules() if type(m) is RMSNorm]
        assert norms
        for norm in norms:
            norm.__class__ = _StatefulNorm
        assert any("norm._extra_state" in name for chunk in trainable.modules for name in chunk.state_dict())


def _own_tensors(trainable: Trainable, data_rank: int) -> list[tuple[str, Tensor]]:
    """Every parameter and state tensor, on one rank only or in pieces that do not overlap."""
    optimizer = trainable.optimizer.chained_optimizers[0]
    distributed = isinstance(optimizer, DistributedOptimizer)
    found: list[tuple[str, Tensor]] = []
    named = [(chunk, *pair) for chunk in trainable.modules for pair in chunk.named_parameters()]
    for chunk, local_name, parameter in named:
        if not (param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)):
            continue
        parts = local_name.split(".")
        if "layers" in parts:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        name = ".".join(parts)
        if data_rank == 0:
            found.append((name, parameter))
        main: Tensor = parameter
        if distributed:
            if parameter not in optimizer.model_param_group_index_map:
                continue
            group, order = optimizer.model_param_group_index_map[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][order]
        elif data_rank != 0:
            continue
        elif parameter.dtype != torch.float32:
            main = parameter.main_param  # type: ignore[attr-defined]
        found.append((f"{name}.main", main))
        found += [(f"{name}.{k}", v) for k, v in optimizer.optimizer.state[main].items() if k != "step"]
    return found


def distance(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """Largest difference of fingerprints, relative to what is summed."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    worst = 0.0
    for name, (plain, squares, high, low) in expected.items():
        scale = max(math.sqrt(squares), 1e-30)
        worst = max(
            worst, *(abs(a - b) / scale for a, b in zip(found[name], (plain, 0, high, low), strict=True) if b)
        )
        worst = max(worst, abs(found[name][0] - plain) / scale, abs(found[name][1] - squares) / scale**2)
    return worst


def relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _bitwise(run: Run, expected: list[Tensor]) -> bool:
    found = run.tensors()
    same = len(found) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )
    everyone: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(everyone, same)
    return all(everyone)


def check(args: dict[str, Any], result: dict[str, Any]) -> None:
    """Assert that ``result`` of ``run(args)`` is right."""
    tolerance = LOSSES[args.get("dtype", "fp32")]
    assert result["bitwise"] and result["extra"], result
    for layout, found in result["layouts"].items():
        assert found["extra"], (layout, found)
        assert found["loaded"] <= SAME_NUMBERS, (layout, found)
        assert found["losses"] <= tolerance, (layout, found)
    if args.get("optimizer", {}) != {"name": "sgd", "distributed": False}:
        # The losses do tell whether moments and step count were restored (plain SGD has none).
        assert result["losses_without_state"] > 2 * tolerance, result


def run(args: dict[str, Any]) -> dict[str, Any]:
    """Train and save in ``args["save"]``, load there and in every ``args["load"]``.

    Layouts are [tensor, pipeline], or [tensor, pipeline, virtual_pipeline].

    Norms have an extra state either there (``stateful``) or in the other layouts. Other arguments:
    directory, optimizer (a section), dtype, layers, tied, vocab, background (files are written after the
    steps that follow).
    """
    directory = Path(args["directory"])
    in_groups = worlds.enter(*args["save"][:2], seed=1)
    virtual = _virtual(args["save"])
    original = Run(args, in_groups, 1, virtual)
    if args.get("stateful"):
        _give_extra_states(original)
    for _ in range(STEPS):
        original.random_step()
    extra = {"step": STEPS, "rank": in_groups.layout.data_rank}
    held = HeldFiles(directory) if args.get("background") else None
    checkpoint.save(directory, original.trainables, extra, in_groups, writer=held)
    dist.barrier()
    saved = original.fingerprint()
    for _ in range(STEPS):
        original.random_step()
    uninterrupted = original.tensors()
    if held is not None:  # as late as a disk can be: the models have changed meanwhile
        _write(directory, held, in_groups)

    resumed = Run(args, in_groups, 2, virtual)
    loaded_extra = checkpoint.load(directory, resumed.trainables, in_groups)
    for _ in range(STEPS):
        resumed.random_step()
    result: dict[str, Any] = {
        "bitwise": _bitwise(resumed, uninterrupted),
        "extra": loaded_extra == {"step": STEPS, "rank": in_groups.layout.data_rank},
        "layouts": {},
    }
    reference = _losses_after_loading(args, in_groups, directory, saved, virtual)
    forgetful = _losses_after_loading(args, in_groups, directory, saved, virtual, forget=True)
    result["losses_without_state"] = relative(forgetful["losses"], reference["losses"])
    for layout in args["load"]:
        found = _losses_after_loading(
            args,
            worlds.enter(*layout[:2], seed=3),
            directory,
            saved,
            _virtual(layout),
            stateful=not args.get("stateful"),
        )
        found["losses"] = relative(found["losses"], reference["losses"])
        result["layouts"]["x".join(map(str, layout))] = found
    return result


def _write(directory: Path, held: HeldFiles, in_groups: Groups) -> None:
    background = BackgroundSave(directory, held, Collective(in_groups).everywhere)
    assert background.wait(60)
    for name, entry in background.finish().items():
        assert measured(directory / name) == entry
    dist.barrier()


def _virtual(layout: Sequence[int]) -> int:
    return layout[2] if len(layout) > 2 else 1


def _losses_after_loading(
    args: dict[str, Any],
    in_groups: Groups,
    directory: Path,
    saved: dict[str, list[float]],
    virtual: int,
    forget: bool = False,
    stateful: bool = False,
) -> dict[str, Any]:
    other = Run(args, in_groups, 3, virtual)
    if stateful:
        _give_extra_states(other)
    extra = checkpoint.load(directory, other.trainables, in_groups)
    padded = args.get("vocab", 256) % 256 != 0  # padding is as large as the layout makes it
    loaded = 0.0 if padded else distance(other.fingerprint(), saved)
    if forget:
        for trainable in other.trainables.values():
            for state in trainable.optimizer.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
    losses = [other.step(seed) for seed in range(100, 100 + STEPS)]
    return {"loaded": loaded, "losses": losses, "extra": extra["step"] == STEPS}
