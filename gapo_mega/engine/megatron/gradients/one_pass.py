"""``gradients.forward: one_pass``: all objectives' gradients from one forward and, mostly, one backward.

The cotangents of all losses are known as soon as the log-probabilities are. Where those of a sequence are
multiples of one another, one backward of the activations serves all objectives, and only the products that
give weight gradients know of several (``cotangents.py``, ``accumulator.py``). The rows are reduced once an
update, however many microbatches it has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega.config.strategies.kept_rows import KeptRows
from gapo_mega.config.strategies.one_pass import OnePassRows
from gapo_mega.engine.megatron.gradients import capture, cotangents
from gapo_mega.engine.megatron.gradients.accumulator import Accumulator
from gapo_mega.engine.megatron.gradients.kept_rows import Shards
from gapo_mega.engine.megatron.gradients.passes import Task
from gapo_mega.engine.megatron.gradients.shard import bytes_of
from gapo_mega.engine.megatron.gradients.sharers import Sharers
from gapo_mega.engine.megatron.gradients.update import Setting
from gapo_mega.engine.megatron.gradients.whole_rows import WholeRows
from gapo_mega.engine.megatron.model import experts
from gapo_mega.engine.megatron.model.forward import forward_backward, run_policy, sequence_multiple
from gapo_mega.engine.megatron.model.logprobs import Backwards, Wanted
from gapo_mega.engine.megatron.model.packing import sequence_numbers
from gapo_mega.engine.megatron.runtime.clock import Clock
from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.types import Experience, TokenBatch

logger = logging.getLogger(__name__)


class OnePass(Shards):
    """Keeps rows of all of this rank's parameters."""

    declaration = OnePassRows

    def __init__(self, setting: Setting, declared: OnePassRows) -> None:
        reason = capture.refusal(setting.trainable.modules)
        if reason is not None:
            raise ValueError(f"gradients.forward: found one_pass with {reason}, accepted: auto, separate")
        super().__init__(setting, declared)
        layout = setting.groups.layout
        trains_experts = capture.trains_experts(setting.trainable)
        sharers = Sharers.over_data_ranks(layout.tensor) if trains_experts else Sharers()
        self._accumulator = Accumulator(self._whole, layout.tensor, layout.tensor_rank, sharers)
        self._pipelined = layout.pipeline > 1
        self._told = False

    def allocate(self, declared: KeptRows) -> list[list[Tensor]]:
        """Of rows that are whole before the reduction, the parts that this rank owns afterwards."""
        self._whole = WholeRows(self.trainable, self.objectives - 1)
        return self._whole.pieces

    @property
    def row_bytes(self) -> int:
        return self._whole.numel * 4 + bytes_of(self.other_rows)

    def measure(self, task: Task, clock: Clock) -> Tensor:
        """One pass over every microbatch, then one reduction of every row."""
        self._rows = [*self._spare, self.shard.pieces]
        if not self._pipelined:
            losses = self._microbatches(task, clock)
        else:
            found = self._schedule(task, clock)
            if found is None:
                return self.one_by_one(task, clock)
            losses = found
        self._whole.reduce()
        clock.lap("reduce")
        return losses

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """Within the block, backwards fill the rows, and nothing is reduced."""
        self.trainable.zero_grad()
        self._accumulator.start()
        with capture.listening(self.trainable, self._accumulator):
            yield
            self._accumulator.finish()

    # -- without a pipeline --------------------------------------------------------------------------
    def _microbatches(self, task: Task, clock: Clock) -> Tensor:
        losses = torch.zeros(self.objectives, dtype=torch.float64)
        with self._capturing():
            for batch in task.microbatches:
                losses += self._microbatch(task, batch, clock)
        return losses

    def _microbatch(self, task: Task, batch: Experience, clock: Clock) -> Tensor:
        """Add one microbatch's gradients to the rows. Returns its part of every loss."""
        model = self.trainable.model
        backwards = Backwards(last=False)
        output, finish = run_policy(model, batch, sequence_multiple(model), self._wanted(task, backwards))
        batch = batch.to(device())
        policy_BX = finish(output)
        del output, finish
        losses_M, cotangents_MBX = _cotangents(task, policy_BX, batch)
        clock.lap("forward")
        directions = cotangents.Directions(cotangents_MBX)
        passes = directions.factors(self._agreed_rank(directions.rank))
        for number, factor in enumerate(passes, start=1):
            self._accumulator.take(factor.coefficients_MB, policy_BX.device, factor.only)
            backwards.last = number == len(passes)
            torch.autograd.backward(policy_BX, factor.cotangent_BT, retain_graph=not backwards.last)
        clock.lap("backward")
        return losses_M

    def _wanted(self, task: Task, backwards: Backwards) -> Wanted:
        wanted = task.wanted(backwards)
        return replace(wanted, on_batch=self._begin, on_rows=self._accumulator.take_output_rows)

    def _begin(self, batch: TokenBatch) -> None:
        """Experts ask in the forward whose their rows are, all other modules in the backward."""
        self._accumulator.take_positions(_numbers(batch), device())

    def _agreed_rank(self, found: int) -> int:
        """The number of passes; all ranks of a stage take equally many, and data ranks that share experts."""
        if self.groups.layout.tensor * self.groups.layout.context > 1:
            largest = torch.tensor(found)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.replica)
            found = int(largest)
        return experts.most_among_sharers(found)

    # -- with a pipeline -----------------------------------------------------------------------------
    def _schedule(self, task: Task, clock: Clock) -> Tensor | None:
        """One run of Megatron's schedule with the advantages for coefficients, which every stage knows.

        None if they turn out not to be the coefficients of the losses, on any rank.
        """
        known = [
            cotangents.sequence_coefficients(batch.advantages_MBT, batch.response_mask_BT)
            for batch in task.microbatches
            if batch.advantages_MBT is not None
        ]
        fits = len(known) == len(task.microbatches) and all(
            # Every row has advantages, unless it is the KL's.
            found is not None and len(found) == self.objectives
            for found in known
        )
        losses_and_misses = torch.zeros(self.objectives + 1, dtype=torch.float64)
        if self._agreed_by_all(fits):
            with self._capturing():
                losses_and_misses = self._run_schedule(task)
            clock.lap("one_pass")
            fits = bool(losses_and_misses[-1] == 0)
        if self._agreed_by_all(fits):
            return losses_and_misses[:-1]
        if not self._told:
            logger.warning(
                "gradients.forward one_pass: the losses of a sequence are not multiples of one another "
                "(clipped ratios, a KL term in the loss, or advantages of tokens), which a pipeline learns "
                "too late: such updates are done again by separate passes; gradients.forward: separate "
                "saves the first try"
            )
            self._told = True
        return None

    def _run_schedule(self, task: Task) -> Tensor:
        """The losses of this rank [M], and the number of microbatches that did not fit; last stage only."""
        chunks = self.trainable.chunks
        config = chunks[0].config

        def bind(output: Tensor, batch: Experience) -> None:
            # Stages alternate microbatches: the coefficients change when a backward begins. The hook must not
            # hold the output, which would then outlive its backward.
            coefficients_MB, where = _advantages(batch), output.device
            numbers_S = _numbers(batch)

            def take(_: Tensor) -> None:
                self._accumulator.take_positions(numbers_S, where)
                self._accumulator.take(coefficients_MB, where)

            output.register_hook(take)  # type: ignore[no-untyped-call]

        def loss(policy_BX: Tensor, batch: Experience) -> tuple[Tensor, Tensor]:
            bind(policy_BX, batch)  # the output layer's backward may come before that of its stage's output
            losses_M, cotangents_MBX = _cotangents(task, policy_BX, batch)
            cotangent_BX, fits = cotangents.along(cotangents_MBX, _advantages(batch))
            logged = torch.cat([losses_M, torch.tensor([float(not fits)], dtype=torch.float64)])
            return (policy_BX * cotangent_BX).sum(), logged

        reduce = config.finalize_model_grads_func
        config.finalize_model_grads_func = None
        try:
            return forward_backward(
                chunks,
                task.microbatches,
                loss,
                self.objectives + 1,
                on_output=bind,
                policy=self._wanted(task, Backwards(last=True)),
            )
        finally:
            config.finalize_model_grads_func = reduce

    @staticmethod
    def _agreed_by_all(fits: bool) -> bool:
        """Whether it fits on every rank of the world."""
        misses = torch.tensor(0 if fits else 1)
        dist.all_reduce(misses)
        return int(misses) == 0


def _numbers(batch: TokenBatch) -> Tensor | None:
    """Whose the positions of a packed microbatch are."""
    return None if batch.packed_width is None else sequence_numbers(batch)


def _advantages(batch: Experience) -> Tensor:
    assert batch.advantages_MBT is not None
    found = cotangents.sequence_coefficients(batch.advantages_MBT, batch.response_mask_BT)
    assert found is not None, "checked for all microbatches before the schedule"
    return found


def _cotangents(task: Task, policy_BX: Tensor, batch: Experience) -> tuple[Tensor, Tensor]:
    """Every loss [M], float64 on the CPU, and its gradient by what it depends on [M, B, X]."""
    leaf_BX = policy_BX.detach().requires_grad_()
    with torch.enable_grad():
        losses = task.losses_of(leaf_BX, batch)
    found = [
        torch.autograd.grad(loss, leaf_BX, retain_graph=True, materialize_grads=True)[0] for loss in losses
    ]
    return torch.stack(losses).detach().double().cpu(), torch.stack(found)
