"""Forward and backward passes over microbatches through Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.types import AnyBatch

# (model output on the last stage, microbatch) -> scalar loss, already divided by the global token count, so
# that its *sum* over microbatches and data-parallel ranks is the loss to minimise; and numbers to log, summed
# likewise.
LossOf = Callable[[Tensor, AnyBatch], tuple[Tensor, Tensor]]
OutputOf = Callable[[Tensor, AnyBatch], Tensor]


def run_model(model: nn.Module, tokens_BT: Tensor, multiple: int) -> Tensor:
    """The stage's output for right-padded tokens, which need no padding mask under causal attention.

    Pads sequences to a multiple of ``multiple``, because sequence parallelism splits them.
    """
    padded_BT = nn.functional.pad(tokens_BT, (0, -tokens_BT.shape[1] % multiple))
    positions_BT = torch.arange(padded_BT.shape[1], device=padded_BT.device).expand_as(padded_BT)
    output: Tensor = model(input_ids=padded_BT, position_ids=positions_BT, attention_mask=None)
    return output


def sequence_multiple(model: nn.Module) -> int:
    """The ``multiple`` that ``run_model`` needs for this model."""
    config = get_model_config(model)
    return int(config.tensor_model_parallel_size) if config.sequence_parallel else 1


def _schedule(
    model: nn.Module,
    microbatches: Sequence[AnyBatch],
    on_last_stage: Callable[[Tensor, AnyBatch], Any],
    **options: Any,
) -> list[Any]:
    multiple = sequence_multiple(model)

    def step(batches: Iterator[AnyBatch], stage: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches).to(device())
        output = run_model(stage, batch.tokens_BT, multiple)
        # Cuts off the padding of sequence parallelism; only the last stage's output is [B, T, ...].
        return output, lambda out, **_: on_last_stage(out[:, : batch.tokens_BT.shape[1]], batch)

    rows, columns = microbatches[0].tokens_BT.shape
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=columns + (-columns % multiple),
        micro_batch_size=rows,
        **options,
    )
    return results


def forward_backward(
    model: nn.Module, microbatches: Sequence[AnyBatch], loss: LossOf[AnyBatch], logged_numbers: int = 1
) -> Tensor:
    """Accumulate the gradients of all microbatches in the model's gradient buffer, then reduce them.

    Returns the sum of this data rank's ``[logged_numbers]`` from ``loss``, float64 on the CPU, on the last
    pipeline stage (zeros elsewhere).
    """

    def on_last_stage(output: Tensor, batch: AnyBatch) -> tuple[Tensor, Tensor, Tensor]:
        value, logged = loss(output, batch)
        # The second is Megatron's token count, which reduction.reduce_gradients ignores.
        return value, torch.zeros((), dtype=torch.int, device=value.device), logged.detach().reshape(-1)

    parts = _schedule(model, microbatches, on_last_stage, forward_only=False)
    total = torch.zeros(logged_numbers, dtype=torch.float64)
    return total + torch.stack(parts).double().sum(dim=0).cpu() if parts else total


@torch.no_grad()
def forward_only(
    model: nn.Module, microbatches: Sequence[AnyBatch], output_of: OutputOf[AnyBatch]
) -> list[Tensor]:
    """``output_of`` for each microbatch on the last pipeline stage; an empty list elsewhere."""
    return _schedule(model, microbatches, output_of, forward_only=True, collect_non_loss_data=True)
