"""Megatron's optimizer around a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from gapo_mega.config import OptimizerConfig
from gapo_mega.engine.megatron.model import assumptions, gathering
from gapo_mega.engine.megatron.model.buffers import buffers_of, optimizer_instances
from gapo_mega.engine.megatron.model.reduction import reduce_gradients
from gapo_mega.engine.megatron.runtime import releases
from gapo_mega.models.casting import is_finite


@dataclass(eq=False)
class Trainable:
    """A model in DistributedDataParallel with its optimizer and learning-rate schedule.

    Attributes:
        chunks: this rank's part of the model, in the order of ``build_chunks``: one, or several where the
            pipeline is interleaved. One optimizer steps all of them.
        begun: optimizer steps that this process has begun.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    begun: int = 0

    @property
    def model(self) -> DistributedDataParallel:
        """The only chunk."""
        (model,) = self.chunks
        return model

    @property
    def modules(self) -> list[GPTModel]:
        """The bare models of the chunks."""
        return [chunk.module for chunk in self.chunks]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        dtype: torch.dtype = self.chunks[0].config.params_dtype
        return dtype

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all chunks."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def zero_grad(self) -> None:
        """Zero the gradient buffers and clear ``param.grad``.

        Megatron's fp32 optimizer leaves ``param.grad`` an alias of the buffer. The next backward would
        accumulate into it, and its hook would add it to the buffer again: one microbatch would count twice.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def grad_norm(self) -> float:
        """Megatron's norm of the gradient in the buffer; ``step`` may follow."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def resident(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimizer state on this rank, by the tensors."""
        steppers = [inner.optimizer for inner in self.optimizer.chained_optimizers]
        parameters = self.parameters()
        own = {p.data_ptr() for p in parameters}
        mains = [p for stepper in steppers for group in stepper.param_groups for p in group["params"]]
        held = [tensors for stepper in steppers for tensors in stepper.state.values()]
        state = [t for tensors in held for t in tensors.values() if torch.is_tensor(t)]
        # Without bf16 the optimizer steps the parameters themselves, or views of them.
        bf16 = self.chunks[0].config.bf16
        copies = [p for p in mains if bf16 and p.data_ptr() not in own]
        return {
            "parameters": _bytes(parameters),
            "gradients": _bytes([b.grad_data for chunk in self.chunks for b in buffers_of(chunk)]),
            "optimizer": _bytes(state) + _bytes(copies),
        }

    def step(self) -> float:
        """One optimizer and scheduler step on a finite gradient. Returns the norm before clipping."""
        self.begun += 1
        updated, norm, _ = self.optimizer.step()
        assert updated, "the gradient was found finite"
        gathering.mark_stepped(self.chunks)
        self.scheduler.step(1)
        return float(norm)

    def is_finite(self) -> bool:
        """Whether this rank's parameters are finite; those of other data ranks once they are gathered."""
        return all(is_finite(parameter.detach()) for parameter in self.parameters())

    def gather_parameters(self) -> None:
        """Bring the parameters up to date (``gathering.gather``). Collective over the data ranks."""
        gathering.gather(self.chunks)

    def parameters_gathered(self) -> AbstractContextManager[None]:
        """``gathering.gathered`` of this model."""
        return gathering.gathered(self.chunks)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def make_trainable(chunks: Sequence[GPTModel], optimizer: OptimizerConfig, total_steps: int) -> Trainable:
    """Wrap the chunks of a model for training (``build_chunks``).

    Load their weights *before*: with bf16 the optimizer copies them to fp32.
    Collective. Raises ``RuntimeError`` if this release of megatron-core is not what the engine assumes.
    """
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=optimizer.distributed,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        grad_reduce_in_fp32=True,
        num_distributed_optimizer_instances=optimizer_instances(),
        check_for_nan_in_grad=False,  # the Gram matrix shows a NaN and which objective has it
    )
    config = chunks[0].config  # shared by all
    # As Megatron's own training does: only the first chunk's reduction may delay anything.
    with releases.without_advice():
        wrapped = [
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = reduce_gradients
    if optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    bf16 = config.bf16
    megatron_optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer=optimizer.name,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            sgd_momentum=optimizer.momentum,
            clip_grad=optimizer.clip_grad,
            use_distributed_optimizer=optimizer.distributed,
            overlap_param_gather=optimizer.overlap_param_gather,
            bf16=bf16,
            params_dtype=config.params_dtype,
        ),
        wrapped,
    )
    assumptions.check(wrapped, megatron_optimizer)
    return Trainable(wrapped, megatron_optimizer, _scheduler(megatron_optimizer, optimizer, total_steps))


def _scheduler(
    megatron_optimizer: MegatronOptimizer, optimizer: OptimizerConfig, total_steps: int
) -> OptimizerParamScheduler:
    # Leaves at least one step of decay, because Megatron refuses none.
    warmup = min(int(optimizer.warmup_fraction * total_steps), total_steps - 1)
    scheduler = OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=optimizer.lr / (warmup + 1),
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style=optimizer.schedule,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    return scheduler
