"""What every gradient strategy costs, as a ratio to the single-objective step of the same trainer.

All strategies work on one model, one optimizer and one batch of full-length sequences, and take turns over
the rounds, so that drift of the machine's speed meets all of them alike. A step is the train phase: policy
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
from tqdm import tqdm

from gapo_mega import aggregation
from gapo_mega.config import Config
from gapo_mega.config.strategies import variants
from gapo_mega.engine.base import GradientReport, build_benchmark_engine
from gapo_mega.measuring.allocation import measure_allocations
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.layout import check_gradients
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.planning.strategy import minibatch_sequences
from gapo_mega.types import Experience

BASELINE = "one objective"
_NO_LEARNING = 1e-20  # a learning rate below the rounding of any parameter
# On a CPU gloo's threads may release too late to be seen (allocation.py): the least of several peaks counts.
MEMORY_STEPS = 2
PHASES = ("passes", "aggregate", "optimizer")


@dataclass
class Contender:
    """A strategy with its configuration, and its measurements on this rank."""

    name: str
    objectives: int
    config: Config
    seconds: list[float] = dataclasses.field(default_factory=list)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)
    row_bytes: int = 0
    peak_bytes: int = 0


def check_names(only: Sequence[str]) -> None:
    """Raise ``ValueError`` for a text that is in the name of no variant."""
    names = [declared.name for declared in variants()]
    for text in only:
        if not any(text in name for name in names):
            raise ValueError(f"--only: found {text!r}, accepted: a part of {', '.join(map(repr, names))}")


def contenders(
    config: Config,
    shape: ModelShape,
    data_parallel: int,
    objectives: Sequence[int],
    only: Sequence[str] = (),
) -> list[Contender]:
    """The baseline, and every variant of every declared strategy for each number of objectives.

    Variants that the layout or the batch does not allow are left out; so are those whose name has no text of
    ``only`` in it, if that is not empty.
    """
    found = [Contender(BASELINE, 1, _variant(config, 1, {"forward": "separate"}))]
    for count in objectives:
        for declared in variants():
            if only and not any(text in declared.name for text in only):
                continue
            variant = _variant(config, count, declared.gradients)
            if refusal(variant, shape, data_parallel) is None:
                found.append(Contender(declared.name, count, variant))
    return found


def refusal(config: Config, shape: ModelShape, data_parallel: int) -> str | None:
    """Why the settings do not fit together; None if they do."""
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
        | {"metric": "euclidean", "actual_change": False, "audit_every": 0}
        | dict(settings)
    )
    # Rows of objectives alone, as the batch has them.
    plain = {
        "aggregation": config.aggregation.model_copy(update={"average": 0.0}),
        "scalarization": None,
        "algorithm": config.algorithm.model_copy(update={"kl": "reward", "kl_target": None}),
    }
    return config.model_copy(update={"objectives": named, "gradients": gradients, **plain})


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
        values_MBT=torch.zeros(objectives, *size),
        advantages_MBT=advantages_MB[:, :, None] * mask_BT,
        returns_MBT=advantages_MB[:, :, None] * mask_BT,
    )


class StepBenchmark:
    """The engine, the batch, and the contenders' turns."""

    def __init__(self, resolved: ResolvedRun, objectives: Sequence[int], only: Sequence[str] = ()) -> None:
        self.config = config = resolved.config
        shape = resolved.shape
        # With one objective the engine's own strategy holds no rows beside the contenders'.
        own = _variant(config, 1, {})
        # Every turn trains on the same batch. Parameters that moved would leave PPO's clipping range, where
        # gradients are zero and work is saved.
        still = {"lr": _NO_LEARNING, "weight_decay": 0.0}
        own = own.model_copy(update={"optimizer": own.optimizer.model_copy(update=still)})
        self._alone = dataclasses.replace(resolved, config=own, critic=None)
        self.engine = build_benchmark_engine(self._alone)
        layout = self.engine.layout
        self.contenders = contenders(config, shape, layout.data, objectives, only)
        sequences = minibatch_sequences(config, layout.data)
        batch = synthetic_batch(config, shape, sequences, max(objectives), layout.data_rank)
        old_BT = self.engine.logprobs(batch, "policy")
        self.batch = dataclasses.replace(batch, old_logprobs_BT=old_BT)
        self.aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
        self.loss = resolved.loss

    def run(self, rounds: int) -> None:
        """One warm-up round with memory measured, then ``rounds`` timed ones."""
        for contender in self._turns(1, "memory"):
            self._measure_memory(contender)
        for contender in self._turns(rounds, "time"):
            self._prepare(contender)
            seconds, report = self._step(contender)
            contender.seconds.append(seconds)
            contender.phases.append(_by_phase(report))

    def _turns(self, rounds: int, what: str) -> Iterator[Contender]:
        turns = [c for _ in range(rounds) for c in self.contenders]
        quiet = not self.engine.layout.is_main or not sys.stderr.isatty()
        yield from tqdm(turns, desc=what, unit="step", disable=quiet)

    def _prepare(self, contender: Contender) -> None:
        """Let the engine measure gradients as the contender does."""
        rows = self.engine.take_strategy(dataclasses.replace(self._alone, config=contender.config))
        contender.row_bytes = self.engine.largest(rows)

    def _measure_memory(self, contender: Contender) -> None:
        self._prepare(contender)
        self._step(contender)  # allocates what then stays, such as the optimizer's state
        peaks = []
        for _ in range(MEMORY_STEPS):
            with measure_allocations(self.engine.device) as found:
                self._step(contender)
            peaks.append(found.peak_bytes)
        contender.peak_bytes = self.engine.largest(min(peaks))

    def _step(self, contender: Contender) -> tuple[float, GradientReport]:
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
        report = self.engine.update_policy(batch, self.loss, self.aggregator)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.engine.barrier()
        assert not report.skipped and not report.excluded, report  # a zero gradient saves work
        # Every turn builds the strategy anew, and only its first step compares norms with Megatron's.
        return time.perf_counter() - started - report.seconds.pop("check", 0.0), report

    def result(self) -> dict[str, Any]:
        """Medians, ratios to the baseline of the same round, and bytes by kind. Collective.

        Each number of bytes is that of the rank with the most of this kind.
        """
        baseline = self.contenders[0]
        return {
            "bytes": {kind: self.engine.largest(size) for kind, size in self.engine.resident().items()},
            "strategies": [_summary(contender, baseline) for contender in self.contenders],
        }


def _by_phase(report: GradientReport) -> dict[str, float]:
    """Seconds of passes (all forwards and backwards), aggregation and optimizer."""
    known = {name: report.seconds.get(name, 0.0) for name in ("aggregate", "optimizer")}
    passes = sum(seconds for name, seconds in report.seconds.items() if name not in known)
    return {"passes": passes, **known}


def _summary(contender: Contender, baseline: Contender) -> dict[str, Any]:
    ratios = [mine / one for mine, one in zip(contender.seconds, baseline.seconds, strict=True)]
    passes = [
        mine["passes"] / one["passes"] for mine, one in zip(contender.phases, baseline.phases, strict=True)
    ]
    return {
        "name": contender.name,
        "objectives": contender.objectives,
        "gradients": contender.config.gradients.model_dump(),
        "seconds": statistics.median(contender.seconds),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "passes_ratio": statistics.median(passes),
        "phases_seconds": {p: statistics.median(s[p] for s in contender.phases) for p in PHASES},
        "row_bytes": contender.row_bytes,
        "peak_bytes": contender.peak_bytes,
    }
