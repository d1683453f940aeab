"""Forward and backward passes over microbatches through Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn

from gapo_mega.engine.megatron.model import context, experts
from gapo_mega.engine.megatron.model.chunked_head import left_out
from gapo_mega.engine.megatron.model.logprobs import Distribution, Wanted, logprobs_of
from gapo_mega.engine.megatron.model.microbatches import Microbatches
from gapo_mega.engine.megatron.model.packing import in_rows, run_packed, sequence_numbers, unpacked
from gapo_mega.engine.megatron.model.response_positions import Rectangle, output_only_at
from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.planning.schedule import microbatch_group
from gapo_mega.types import AnyBatch, TokenBatch
from gapo_mega.whereabouts import get_on

# (model output on the last stage, microbatch) -> scalar loss, already divided by the global token count, so
# that its *sum* over microbatches and data-parallel ranks is the loss to minimise; and numbers to log, summed
# likewise. The output is [B, T, X] or, where asked for, [N, X] at the positions that predict response tokens.
LossOf = Callable[[Tensor, AnyBatch], tuple[Tensor, Tensor]]
# (a stage's output, microbatch), called before anything is computed from the output
OnOutput = Callable[[Tensor, AnyBatch], None]
OutputOf = Callable[[Tensor, AnyBatch], Tensor]
OnRows = Callable[[Tensor], None]  # as in ``Wanted``
Chunks = Sequence[nn.Module]  # this rank's part of a model, in the order of ``build_chunks``


def run_model(model: nn.Module, tokens_BT: Tensor, multiple: int, lengths_B: Tensor | None = None) -> Tensor:
    """The stage's output for right-padded tokens, which need no padding mask under causal attention.

    Pads sequences to a multiple of ``multiple``, because sequence parallelism splits them. With context
    parallelism the output is that of this rank's positions. ``lengths_B``: columns without padding, for the
    routers of experts; None: they are not told.
    """
    padded_BT = nn.functional.pad(tokens_BT, (0, -tokens_BT.shape[1] % multiple))
    positions_BT = torch.arange(padded_BT.shape[1], device=padded_BT.device).expand_as(padded_BT)
    if context.size() > 1:
        assert lengths_B is None, "context parallelism with experts is refused"
        own_S = context.own_columns(padded_BT.shape[1]).to(padded_BT.device)
        padded_BT, positions_BT = padded_BT[:, own_S], positions_BT[:, own_S]
    told = {} if lengths_B is None else {"padding_mask": positions_BT < lengths_B[:, None]}
    output: Tensor = model(input_ids=padded_BT, position_ids=positions_BT, attention_mask=None, **told)
    return output


def run_batch(model: nn.Module, batch: TokenBatch, multiple: int, tells_routers: bool = False) -> Tensor:
    """The stage's output for a batch, which may lie on the host; ``[1, S, X]`` if it is packed."""
    if batch.packed_width is not None:
        return run_packed(model, batch, device(), tells_routers)
    lengths_B = batch.lengths_B.to(device()) if tells_routers else None
    return run_model(model, batch.tokens_BT.to(device()), multiple, lengths_B)


def sequence_multiple(model: nn.Module) -> int:
    """The ``multiple`` that ``run_model`` needs for this model."""
    config = get_model_config(model)
    return max(context.multiple(), int(config.tensor_model_parallel_size) if config.sequence_parallel else 1)


def run_at_responses(
    model: nn.Module,
    batch: TokenBatch,
    multiple: int,
    on_rows: OnRows | None = None,
    *,
    tells_routers: bool = False,
) -> Tensor:
    """The outputs ``[N, X]`` that predict response tokens, in the order of the mask.

    Those of an earlier pipeline stage are its hidden states at all positions. ``on_rows``,
    ``tells_routers``: as in ``Wanted``.
    """
    rectangle = _rectangle(batch, multiple)
    if on_rows is not None and batch.packed_width is not None:
        on_rows(_row_sequences(batch, rectangle))
    with output_only_at(model, rectangle.to(device())):
        output = run_batch(model, batch, multiple, tells_routers)
    # Squeezed, because the backward of an index would make another tensor of this size.
    return output.squeeze(0) if get_attr_wrapped_model(model, "post_process") else output


def _rectangle(batch: TokenBatch, multiple: int) -> Rectangle:
    """Around the response tokens of the rows that a model gets, or of this rank's positions of them."""
    # Where the mask lies: on the host nobody waits for a device.
    mask_BS = context.own_mask(in_rows(batch).response_mask_BT)
    if context.size() > 1:
        return Rectangle.around(mask_BS, mask_BS.shape[1] - 1, multiple // (2 * context.size()))
    columns = mask_BS.shape[1]
    return Rectangle.around(mask_BS, columns + (-columns % multiple), multiple)


def _row_sequences(batch: TokenBatch, rectangle: Rectangle) -> Tensor:
    """``[R]``: the number of the sequence that each row of a packed batch's rectangle is of."""
    numbers_S = sequence_numbers(batch)
    return numbers_S if rectangle.positions_RB is None else numbers_S[rectangle.positions_RB[:, 0]]


def run_policy(
    model: nn.Module, batch: TokenBatch, multiple: int, wanted: Wanted
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A stage's output, and what makes the policy of it: of a last stage ``[B, X]`` as ``logprobs_of`` gives.

    The output of a last stage is for that alone: hidden states where logits come in chunks.
    """
    if wanted.on_batch is not None:
        wanted.on_batch(batch)
    there = batch.to(device())
    if not wanted.chunk or not get_attr_wrapped_model(model, "post_process"):
        output = run_at_responses(model, batch, multiple, wanted.on_rows, tells_routers=wanted.tells_routers)
        distribution, backwards, entropy = wanted.distribution, wanted.backwards, wanted.entropy
        return output, lambda out: logprobs_of(out, there, distribution, backwards, entropy)
    rectangle = _rectangle(batch, multiple)
    numbers_R = None if batch.packed_width is None else _row_sequences(batch, rectangle)
    with left_out(model, rectangle.to(device()), numbers_R) as head:
        output = run_batch(model, batch, multiple, wanted.tells_routers)
    return output, lambda out: head.policy(out, there, wanted)


def split(
    chunks: Chunks,
    batch: AnyBatch,
    size: int,
    together: int = 1,
    *,
    tokens: int | None = None,
    least: int = 1,
) -> Microbatches[AnyBatch]:
    """``Microbatches`` of ``size`` rows that the chunks' schedule takes.

    An interleaved pipeline exchanges tensors in both directions at once, and its schedule knows one shape.

    Args:
        tokens: packed rows of at most so many, in place of ``size`` rows.
        least: pieces of packed rows, as far as there are sequences; an interleaved pipeline wants one for
            every stage.
    """
    config = get_model_config(chunks[0])
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    multiple = sequence_multiple(chunks[0])
    if tokens is None:
        return Microbatches.of(batch, size, together=together, one_width=interleaved, multiple=multiple)
    assert together == 1, together
    least = max(least, config.pipeline_model_parallel_size) if interleaved else least
    return Microbatches.packed(batch, tokens, least=least, multiple=multiple, one_width=interleaved)


def split_evenly(
    groups: Groups, chunks: Chunks, batch: AnyBatch, size: int, tokens: int | None
) -> Microbatches[AnyBatch]:
    """``split`` into equally many pieces on all data ranks, which have equally many rows. Collective.

    They may reduce gradients after each one, or share experts.
    """
    pieces = split(chunks, batch, size, tokens=tokens)
    if tokens is None:
        return pieces
    most = max(groups.gather_over_data(len(pieces.parts)))
    if most == len(pieces.parts):
        return pieces
    return split(chunks, batch, size, tokens=tokens, least=most)


def _shape(batch: TokenBatch) -> tuple[int, int]:
    """Rows and columns that a model gets, but for the padding of sequence parallelism in unpacked rows."""
    rows, columns = batch.tokens_BT.shape
    return (rows, columns) if batch.packed_width is None else (1, batch.packed_width)


def _as_it_is(output: Tensor) -> Tensor:
    return output


def _schedule(
    chunks: Chunks,
    microbatches: Sequence[AnyBatch],
    on_last_stage: Callable[[Tensor, AnyBatch], Any],
    at_responses: bool,
    on_output: OnOutput[AnyBatch] | None = None,
    policy: Wanted | None = None,
    **options: Any,
) -> list[Any]:
    experts.assert_in_step(len(microbatches))
    multiple = sequence_multiple(chunks[0])
    config = get_model_config(chunks[0])
    stages, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if virtual is not None:
        config.microbatch_group_size_per_vp_stage = microbatch_group(len(microbatches), stages)
    shapes = {_shape(batch) for batch in microbatches}
    assert virtual is None or len(shapes) == 1, shapes
    # All ranks of a replica hold the same rows, so they agree. Stages then send each other shapes first.
    config.variable_seq_lengths = len(shapes) > 1

    def step(batches: Iterator[AnyBatch], stage: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        get_on()
        batch = next(batches)
        there = batch.to(device())
        finish: Callable[[Tensor], Tensor] = _as_it_is
        if policy is not None:
            output, finish = run_policy(stage, batch, multiple, policy)
        elif at_responses:
            output = run_at_responses(stage, batch, multiple)
        else:
            output = run_batch(stage, batch, multiple)
        if on_output is not None:
            on_output(output, there)
        if at_responses or policy is not None:
            return output, lambda out, **_: on_last_stage(finish(out), there)
        if batch.packed_width is not None:
            return output, lambda out, **_: on_last_stage(unpacked(out, there), there)
        if get_attr_wrapped_model(stage, "post_process"):
            output = context.of_all_positions(output)
        # Cuts off the padding of sequence parallelism; only the last stage's output is [B, T, ...].
        return output, lambda out, **_: on_last_stage(out[:, : there.tokens_BT.shape[1]], there)

    rows, columns = _shape(microbatches[0])
    iterators = [iter(microbatches) for _ in chunks]
    results: list[Any] = get_forward_backward_func(stages, virtual)(
        forward_step_func=step,
        data_iterator=iterators[0] if virtual is None else iterators,
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=columns + (-columns % multiple),
        micro_batch_size=rows,
        **options,
    )
    return results


def forward_backward(
    chunks: Chunks,
    microbatches: Sequence[AnyBatch],
    loss: LossOf[AnyBatch],
    logged_numbers: int = 1,
    at_responses: bool = False,
    on_output: OnOutput[AnyBatch] | None = None,
    policy: Wanted | None = None,
) -> Tensor:
    """Accumulate the gradients of all microbatches in the chunks' gradient buffers, then reduce them.

    An interleaved pipeline needs at least as many microbatches as stages, all of one shape. With
    ``at_responses`` the loss gets the outputs ``[N, X]`` that predict response tokens, as
    ``run_at_responses`` gives them, and the output layer computes little else. With ``policy`` it gets what
    ``logprobs_of`` makes of these, and their logits need not all be there at once. Returns the sum of this
    data rank's ``[logged_numbers]`` from ``loss``, float64 on the CPU, on the last pipeline stage (zeros
    elsewhere). ``on_output`` gets the output of every chunk of every stage.
    """

    def on_last_stage(output: Tensor, batch: AnyBatch) -> tuple[Tensor, Tensor, Tensor]:
        value, logged = loss(output, batch)
        # The second is Megatron's token count, which reduction.reduce_gradients ignores.
        return value, torch.zeros((), dtype=torch.int, device=value.device), logged.detach().reshape(-1)

    parts = _schedule(
        chunks, microbatches, on_last_stage, at_responses, on_output, policy, forward_only=False
    )
    total = torch.zeros(logged_numbers, dtype=torch.float64)
    return total + torch.stack(parts).double().sum(dim=0).cpu() if parts else total


@torch.no_grad()
def forward_only(
    chunks: Chunks,
    microbatches: Sequence[AnyBatch],
    output_of: OutputOf[AnyBatch],
    at_responses: bool = False,
    policy: Wanted | None = None,
) -> list[Tensor]:
    """``output_of`` for each microbatch on the last pipeline stage; an empty list elsewhere.

    ``at_responses``, ``policy``: as for ``forward_backward``. An interleaved pipeline takes at least as many
    microbatches as stages, and data ranks that share experts equally many: the last one may be run, and
    ``output_of`` called, more than once.
    """
    config = get_model_config(chunks[0])
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    stages = config.pipeline_model_parallel_size if interleaved else 1
    least = experts.most_among_sharers(max(len(microbatches), stages))
    fillers = [microbatches[-1]] * (least - len(microbatches))
    found = _schedule(
        chunks,
        [*microbatches, *fillers],
        output_of,
        at_responses,
        policy=policy,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found[: len(microbatches)]


def batch_logprobs(
    chunks: Chunks,
    batch: TokenBatch,
    size: int,
    distribution: Distribution,
    chunk: int = 0,
    tokens: int | None = None,
) -> Tensor:
    """Log-probabilities of response tokens ``[B, T]``, float32 on the CPU; ``size`` rows a microbatch.

    Zeros elsewhere, and on all but the last pipeline stage. ``chunk``: as in ``Wanted``. ``tokens``: as for
    ``split``.
    """

    def output_of(policy_BT: Tensor, part: TokenBatch) -> Tensor:
        return policy_BT.cpu()

    pieces = split(chunks, batch, size, tokens=tokens)
    parts = forward_only(chunks, pieces.parts, output_of, policy=Wanted(distribution, chunk=chunk))
    return pieces.rejoin(parts) if parts else torch.zeros(batch.tokens_BT.shape)
