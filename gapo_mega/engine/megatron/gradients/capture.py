"""Takes weight gradients out of autograd: modules hand them to an ``Accumulator``, sequence by sequence.

Within ``listening`` the parameters are frozen, so that autograd passes on gradients of activations alone.
Modules that apply a weight do so by functions of this file, whose backwards give the same gradient of the
activations with the same communication as Megatron's, and hand over what the weight's gradient is made of.
``ColumnParallelLinear`` and ``RowParallelLinear`` look up ``self._forward_impl`` at every call, and the
RMSNorm ``self.scale``: attributes of the instances stand before the classes' methods.

With recomputation the forwards within the backward are the ones that count: no function here keeps anything
of a forward without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from gapo_mega.engine.megatron.gradients.accumulator import Accumulator
from gapo_mega.engine.megatron.gradients.expert_rows import ExpertRows
from gapo_mega.engine.megatron.gradients.row_sequences import RowSequences
from gapo_mega.engine.megatron.model.experts import Router
from gapo_mega.engine.megatron.model.lora import LowRank
from gapo_mega.engine.megatron.model.modules import RMSNorm
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.models import adapters

_LINEAR = (ColumnParallelLinear, RowParallelLinear)
_Rows = Callable[[], RowSequences | None]  # those of the module's next forward, as for ``Accumulator.linear``


def refusal(chunks: Sequence[GPTModel]) -> str | None:
    """Why the gradients of these models cannot be taken out of autograd; None if they can."""
    known = {
        parameter for chunk in chunks for module in chunk.modules() for parameter in _parameters_taken(module)
    }
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and parameter not in known:
                return f"the parameter {name}, whose module hands over no gradients of sequences"
    return None


def _parameters_taken(module: nn.Module) -> Iterator[nn.Parameter]:
    names = ["weight"] if isinstance(module, (*_LINEAR, VocabParallelEmbedding, RMSNorm, Router)) else []
    if isinstance(module, LowRank):
        names += [adapters.A, adapters.B]
    if isinstance(module, ColumnParallelLinear) and not module.skip_bias_add:
        names.append("bias")
    own = dict(module.named_parameters(recurse=False))
    yield from (own[name] for name in names if name in own)


@contextmanager
def listening(trainable: Trainable, accumulator: Accumulator) -> Iterator[None]:
    """Within the block, forwards and backwards add the parameters' gradients to ``accumulator`` alone."""
    parameters = [p for p in trainable.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(trainable.parameters_gathered())
        for parameter in parameters:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        rows_of = stack.enter_context(_rows_of_modules(trainable, accumulator))
        for module in _trained_modules(trainable):
            if isinstance(module, (LowRank, Router)):
                stack.enter_context(_attribute(module, "product", _product(accumulator)))
            elif isinstance(module, _LINEAR):
                linear = _linear(accumulator, rows_of.get(module, _all_positions))
                stack.enter_context(_attribute(module, "_forward_impl", linear))
            elif isinstance(module, RMSNorm):
                stack.enter_context(_attribute(module, "scale", _norm(accumulator)))
            elif isinstance(module, VocabParallelEmbedding):
                stack.callback(module.register_forward_hook(_embedding(accumulator)).remove)
        yield


def _trained_modules(trainable: Trainable) -> list[nn.Module]:
    """All modules; of a model with adapters these alone, because everything else of it is frozen.

    Megatron's layers of frozen weights give the gradient of the activations and no other.
    """
    modules = [module for chunk in trainable.modules for module in chunk.modules()]
    return [module for module in modules if isinstance(module, LowRank)] or modules


def trains_experts(trainable: Trainable) -> bool:
    """Whether weights of experts hand over gradients, which have rows of all ranks that share them."""
    return any(isinstance(module, MoELayer) for module in _trained_modules(trainable))


@contextmanager
def _rows_of_modules(trainable: Trainable, accumulator: Accumulator) -> Iterator[dict[nn.Module, _Rows]]:
    """Of modules that get other rows than all positions; within the block dispatchers tell what these are."""
    chunks = [chunk for chunk in trainable.modules if chunk.post_process]
    rows: dict[nn.Module, _Rows] = {chunk.output_layer: lambda: accumulator.output_rows for chunk in chunks}
    with ExitStack() as stack:
        for layer in _trained_modules(trainable):
            if isinstance(layer, MoELayer):
                watch = ExpertRows(accumulator)
                stack.enter_context(_attribute(layer.token_dispatcher, "watch", watch))
                for number, expert in enumerate(layer.experts.local_experts):
                    rows |= dict.fromkeys(expert.modules(), partial(watch.of, number))
        yield rows


def _all_positions() -> None:
    """The rows of a module that gets every position of the microbatch."""


@contextmanager
def _attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute of the instance that stands before its class's."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


# -- linear layers -----------------------------------------------------------------------------------
def _linear(accumulator: Accumulator, rows: _Rows) -> Callable[..., Tensor]:
    """Of a module with these rows. An expert's input is ``[R, I]``, that of all others ``[S, B, I]``."""

    def forward(
        input: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **_: Any,
    ) -> Tensor:
        of_expert = input.dim() == 2
        output: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            input.unsqueeze(1) if of_expert else input,
            weight,
            bias,
            accumulator,
            allreduce_dgrad,
            tp_group if sequence_parallel else None,
            tp_group,
            rows(),
        )
        return output.squeeze(1) if of_expert else output

    return forward


def _product(accumulator: Accumulator) -> Callable[[Tensor, nn.Parameter], Tensor]:
    def product(x_SBI: Tensor, weight: nn.Parameter) -> Tensor:
        output: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x_SBI, weight, None, accumulator, False, None, None, None
        )
        return output

    return product


class _Linear(torch.autograd.Function):
    """``input [S, B, I]``, ``weight [O, I]`` -> ``[S, B, O]``, as Megatron's own function.

    With ``gathered_over`` the input is this rank's part of the sequence.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_SBI: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        accumulator: Accumulator,
        sum_over_ranks: bool,
        gathered_over: dist.ProcessGroup | None,
        group: dist.ProcessGroup | None,
        rows: RowSequences | None,
    ) -> Tensor:
        ctx.save_for_backward(input_SBI)
        ctx.rows = rows if rows is None else rows.to(input_SBI.device)
        ctx.weight, ctx.bias, ctx.accumulator = weight, bias, accumulator
        ctx.sum_over_ranks, ctx.gathered_over, ctx.group = sum_over_ranks, gathered_over, group
        whole_SBI = input_SBI if gathered_over is None else _gathered(input_SBI, gathered_over)
        output_SBO = torch.matmul(whole_SBI, weight.t())
        return output_SBO if bias is None else output_SBO + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (input_SBI,), grad_SBO = ctx.saved_tensors, grads[0]
        # A transposed gradient, as that of the logits, would else be multiplied position by position.
        grad_SBI = grad_SBO.contiguous().matmul(ctx.weight)
        # The communication overlaps the product of the weight's gradient.
        work, result_SBI = None, grad_SBI
        if ctx.gathered_over is not None:
            result_SBI = torch.empty_like(input_SBI)
            work = dist.reduce_scatter_tensor(result_SBI, grad_SBI, group=ctx.gathered_over, async_op=True)
            input_SBI = _gathered(input_SBI, ctx.gathered_over)
        elif ctx.sum_over_ranks:
            work = dist.all_reduce(grad_SBI, group=ctx.group, async_op=True)
        ctx.accumulator.linear(ctx.weight, input_SBI, grad_SBO, ctx.rows)
        if ctx.bias is not None:
            ctx.accumulator.over_positions(ctx.bias, grad_SBO, ctx.rows)
        if work is not None:
            work.wait()
        return result_SBI, None, None, None, None, None, None, None


def _gathered(part_SBX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All tensor ranks' parts of the sequence."""
    whole_SBX = part_SBX.new_empty(part_SBX.shape[0] * group.size(), *part_SBX.shape[1:])
    dist.all_gather_into_tensor(whole_SBX, part_SBX.contiguous(), group=group)
    return whole_SBX


# -- norms -------------------------------------------------------------------------------------------
def _norm(accumulator: Accumulator) -> Callable[[Tensor, nn.Parameter], Tensor]:
    def scale(normed: Tensor, weight: nn.Parameter) -> Tensor:
        output: Tensor = _Scale.apply(normed, weight, accumulator)  # type: ignore[no-untyped-call]
        return output

    return scale


class _Scale(torch.autograd.Function):
    """``normed [S, B, ..., D]`` times ``weight [D]``."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, weight: Tensor, accumulator: Accumulator) -> Tensor:
        ctx.save_for_backward(normed)
        ctx.weight, ctx.accumulator = weight, accumulator
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (normed,), grad = ctx.saved_tensors, grads[0]
        terms = grad * normed
        heads = list(range(2, terms.dim() - 1))
        ctx.accumulator.over_positions(ctx.weight, terms.sum(dim=heads) if heads else terms)
        return grad * ctx.weight, None, None


# -- embeddings --------------------------------------------------------------------------------------
def _embedding(accumulator: Accumulator) -> Callable[..., Tensor]:
    """A forward hook: its module's frozen output becomes a leaf, whose gradient is the weight's."""

    def hook(module: VocabParallelEmbedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (ids_BS,) = inputs
        leaf = output.detach().requires_grad_(torch.is_grad_enabled())
        if not leaf.requires_grad:
            return leaf

        def add(grad: Tensor) -> None:
            if module.reduce_scatter_embeddings:
                grad = _gathered(grad, module.tp_group).transpose(0, 1)
            local_BS = ids_BS - module.vocab_start_index
            here_BS = (local_BS >= 0) & (local_BS < module.num_embeddings_per_partition)
            accumulator.embedding(module.weight, local_BS, here_BS, grad)

        leaf.register_hook(add)  # type: ignore[no-untyped-call]
        return leaf

    return hook
