"""What every gradient strategy costs, as a ratio to the single-objective step of the same trainer.

All strategies work on one model, one optimizer and one batch of full-length sequences, and take turns over
the rounds, so that a machine whose speed drifts drifts for all of them. A step is the train phase: policy
forward and backward, Gram matrix, weights, combination, optimizer; no rollout, scoring or critic.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from gapo_mega import aggregation, losses
from gapo_mega.config import Config
from gapo_mega.config.strategies import variants
from gapo_mega.engine.base import GradientReport
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.gradients import strategies
from gapo_mega.engine.megatron.gradients.update import GradientStrategy
from gapo_mega.engine.megatron.runtime.cpu import device, megatron_device
from gapo_mega.measuring.allocation import measure_allocations
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.layout import check_gradients
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.planning.strategy import microbatches
from gapo_mega.types import Experience

BASELINE = "one objective"
_NO_LEARNING = 1e-20  # a learning rate below the rounding of any parameter
# On a CPU gloo's threads may release too late to be seen (allocation.py): of several peaks the least counts.
MEMORY_STEPS = 2
PHASES = ("passes", "aggregate", "optimizer")


@dataclass
class Contender:
    """A strategy with its configuration, and what was measured of it on this rank."""

    name: str
    objectives: int
    config: Config
    seconds: list[float] = dataclasses.field(default_factory=list)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)
    row_bytes: int = 0
    peak_bytes: int = 0


def contenders(
    config: Config, shape: ModelShape, data_parallel: int, objectives: Sequence[int]
) -> list[Contender]:
    """The baseline, and every variant of every declared strategy that is possible, for each number of
    objectives: those that the layout or the batch does not allow are left out."""
    found = [Contender(BASELINE, 1, _variant(config, 1, {"forward": "separate"}))]
    for count in objectives:
        for declared in variants():
            variant = _variant(config, count, declared.gradients)
            if refusal(variant, shape, data_parallel) is None:
                found.append(Contender(declared.name, count, variant))
    return found


def refusal(config: Config, shape: ModelShape, data_parallel: int) -> str | None:
    """Why the settings cannot be used together, if so."""
    try:
        Config.model_validate(config.model_dump())
        check_gradients(config, shape, data_parallel)
    except ValueError as error:
        return str(error)
    return None


def _variant(config: Config, objectives: int, settings: Mapping[str, Any]) -> Config:
    """``config`` with this many objectives and these ``gradients``; not validated."""
    first = config.objectives[0]
    named = [first.model_copy(update={"name": f"objective{i}"}) for i in range(objectives)]
    gradients = config.gradients.model_copy(
        update={"store": "shards", "store_dtype": "fp32", "forward": "auto", "scope": "full"}
        | {"metric": "euclidean", "actual_change": False}
        | dict(settings)
    )
    return config.model_copy(update={"objectives": named, "gradients": gradients})


def synthetic_batch(
    config: Config, shape: ModelShape, sequences: int, objectives: int, seed: int
) -> Experience:
    """Random tokens: every prompt ``max_prompt_tokens``, every response ``max_new_tokens`` long."""
    generator = torch.Generator().manual_seed(seed)
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    size = (sequences, prompt + response)
    mask_BT = (torch.arange(prompt + response) >= prompt).expand(size).contiguous()
    advantages_MB = torch.randn(objectives, sequences, generator=generator)
    return Experience(
        tokens_BT=torch.randint(0, shape.vocab, size, generator=generator),
        response_mask_BT=mask_BT,
        group_B=torch.arange(sequences),
        old_logprobs_BT=torch.zeros(size),
        ref_logprobs_BT=torch.zeros(size),
        scores_MB=advantages_MB,
        token_rewards_MBT=torch.zeros(objectives, *size),
        advantages_MBT=advantages_MB[:, :, None] * mask_BT,
    )


class StepBenchmark:
    """The engine, the batch, and the contenders' turns."""

    def __init__(self, resolved: ResolvedRun, objectives: Sequence[int]) -> None:
        self.config = config = resolved.config
        shape = resolved.shape
        # With one objective the engine's own strategy holds no rows beside the contenders'.
        own = _variant(config, 1, {})
        # Every turn trains on the same batch. Parameters that moved would leave PPO's clipping range, where
        # gradients are zero and work is saved.
        still = {"lr": _NO_LEARNING, "weight_decay": 0.0}
        own = own.model_copy(update={"optimizer": own.optimizer.model_copy(update=still)})
        alone = dataclasses.replace(resolved, config=own, critic=None)
        self.engine = MegatronEngine(alone, pad_id=0, eos_ids=[0])
        layout = self.engine.layout
        self.contenders = contenders(config, shape, layout.data, objectives)
        sequences = microbatches(config, layout.data) * config.micro_batch_size
        batch = synthetic_batch(config, shape, sequences, max(objectives), layout.data_rank)
        old_BT = self.engine.logprobs(batch.tokens_BT, batch.response_mask_BT, "policy")
        self.batch = dataclasses.replace(batch, old_logprobs_BT=old_BT)
        self.aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
        self.loss = losses.build(config.loss.name, **config.loss.options)

    def run(self, rounds: int) -> None:
        """One warm-up round with memory measured, then ``rounds`` timed ones."""
        for contender in self._turns(1, "memory"):
            self._measure_memory(contender)
        for contender in self._turns(rounds, "time"):
            seconds, report = self._step(contender, self._strategy(contender))
            contender.seconds.append(seconds)
            contender.phases.append(_by_phase(report))

    def _turns(self, rounds: int, what: str) -> Iterator[Contender]:
        turns = [c for _ in range(rounds) for c in self.contenders]
        quiet = not self.engine.layout.is_main or not sys.stderr.isatty()
        yield from tqdm(turns, desc=what, unit="step", disable=quiet)

    def _strategy(self, contender: Contender) -> GradientStrategy:
        with megatron_device():
            engine = self.engine
            strategy = strategies.build(contender.config, engine.policy, engine.groups, engine.shape)
        contender.row_bytes = _most(strategy.row_bytes)
        return strategy

    def _measure_memory(self, contender: Contender) -> None:
        strategy = self._strategy(contender)
        self._step(contender, strategy)  # what is allocated once, such as the optimizer's state
        peaks = []
        for _ in range(MEMORY_STEPS):
            with measure_allocations(device()) as found:
                self._step(contender, strategy)
            peaks.append(found.peak_bytes)
        contender.peak_bytes = _most(min(peaks))

    def _step(self, contender: Contender, strategy: GradientStrategy) -> tuple[float, GradientReport]:
        """Wall time of the slowest rank, and the report."""
        assert self.batch.advantages_MBT is not None
        count = contender.objectives
        batch = dataclasses.replace(
            self.batch,
            scores_MB=self.batch.scores_MB[:count],
            token_rewards_MBT=self.batch.token_rewards_MBT[:count],
            advantages_MBT=self.batch.advantages_MBT[:count],
        )
        self.engine.barrier()
        started = time.perf_counter()
        with megatron_device():
            report = strategy.step(batch, self.loss, self.aggregator)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.engine.barrier()
        assert not report.skipped and not report.excluded, report  # a zero gradient saves work
        # Every turn builds the strategy anew, and its first step alone compares norms with Megatron's.
        return time.perf_counter() - started - report.seconds.pop("check", 0.0), report

    def result(self) -> dict[str, Any]:
        """Medians, ratios to the baseline of the same round, and bytes by kind. Collective.

        Each number of bytes is that of the rank with the most of this kind.
        """
        baseline = self.contenders[0]
        return {
            "bytes": {kind: _most(size) for kind, size in self._resident().items()},
            "strategies": [_summary(contender, baseline) for contender in self.contenders],
        }

    def _resident(self) -> dict[str, int]:
        """Parameters, gradients and optimizer state of the policy as tensors hold them."""
        trainable = self.engine.policy
        (inner,) = trainable.optimizer.chained_optimizers
        parameters = list(trainable.model.parameters())
        own = {p.data_ptr() for p in parameters}
        mains = [p for group in inner.optimizer.param_groups for p in group["params"]]
        state = [t for held in inner.optimizer.state.values() for t in held.values() if torch.is_tensor(t)]
        # Without bf16 the optimizer steps the parameters themselves, or views of them.
        copies = [p for p in mains if self.config.model.dtype == "bf16" and p.data_ptr() not in own]
        return {
            "parameters": _bytes(parameters),
            "gradients": sum(
                b.grad_data.numel() * b.grad_data.element_size() for b in trainable.model.buffers
            ),
            "optimizer": _bytes(state) + _bytes(copies),
        }


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _most(size: int) -> int:
    """The greatest of all ranks' sizes. Collective."""
    found = torch.tensor(size, dtype=torch.int64, device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def _by_phase(report: GradientReport) -> dict[str, float]:
    """Seconds of passes (all forwards and backwards), aggregation and optimizer."""
    known = {name: report.seconds.get(name, 0.0) for name in ("aggregate", "optimizer")}
    passes = sum(seconds for name, seconds in report.seconds.items() if name not in known)
    return {"passes": passes, **known}


def _summary(contender: Contender, baseline: Contender) -> dict[str, Any]:
    ratios = [mine / one for mine, one in zip(contender.seconds, baseline.seconds, strict=True)]
    return {
        "name": contender.name,
        "objectives": contender.objectives,
        "gradients": contender.config.gradients.model_dump(),
        "seconds": statistics.median(contender.seconds),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "phases_seconds": {p: statistics.median(s[p] for s in contender.phases) for p in PHASES},
        "row_bytes": contender.row_bytes,
        "peak_bytes": contender.peak_bytes,
    }
