"""Sampling from a Megatron model with a KV cache, over tensor and pipeline ranks.

A *lane* is a batch of left-padded rows that go through the model together. There are as many lanes at a time
as pipeline stages, so that every stage has work: while the last stage samples for one lane, the first stage
embeds another. With an interleaved pipeline all lanes pass through the first chunk of every stage before any
passes through the second. Three things keep the work small. The prefill reads a prompt that occurs several
times in a lane once and copies its KV cache. Only the last position is projected to the vocabulary. Finished
rows leave the lane.

Rotary positions are columns of the padded batch. Attention depends on their differences alone, so left
padding does not change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.generation import sampling as sampler
from gapo_mega.engine.megatron.generation.results import Results
from gapo_mega.engine.megatron.runtime.cpu import device, megatron_device
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.types import Generation, TokenWatcher

# Repack a lane once this share of its rows has finished: a copy of the KV cache costs less than a step.
_REPACK_FROM = 0.25
# Megatron's switches for sequence parallelism on the modules that communicate.
_SEQUENCE_SWITCHES = ("sequence_parallel", "reduce_scatter_embeddings")


@dataclass
class _Lane:
    """Rows that go through the model together; finished rows leave."""

    number: int
    rows_B: Tensor  # int64, CPU: the requests that are still in the lane
    history_BT: Tensor  # int64, device: left-padded prompts, responses so far, and room for the rest
    padding_B: Tensor  # int64, device: columns of padding on the left
    prompt_columns: int
    context: StaticInferenceContext
    step: int = 0  # tokens sampled so far
    kept_BV: Tensor | None = None  # sampling rank: what the tokens being broadcast were drawn from
    packet_2B: Tensor | None = None  # sampling rank: tokens and log-probabilities being broadcast
    sending: tuple[Tensor, dist.Work] | None = None  # hidden states being sent to the next stage
    publishing: dist.Work | None = None

    @property
    def done(self) -> bool:
        return len(self.rows_B) == 0

    @property
    def columns(self) -> int:
        """Filled columns of ``history_BT``."""
        return self.prompt_columns + self.step

    def keep(self, index_B: Tensor) -> None:
        """Keep only these rows (positions in the lane, CPU), in history and KV cache."""
        self.rows_B = self.rows_B[index_B]
        if self.done:
            return
        on_device_B = index_B.to(self.history_BT.device)
        self.history_BT, self.padding_B = self.history_BT[on_device_B], self.padding_B[on_device_B]
        _select_cache_rows(self.context, on_device_B)


def _select_cache_rows(context: StaticInferenceContext, index_B: Tensor) -> None:
    # Megatron's own swap_key_value_dict permutes rows but cannot change their number.
    cache = context.key_value_memory_dict
    for layer, (keys, values) in cache.items():
        cache[layer] = (keys[:, index_B], values[:, index_B])


class MegatronGenerator:
    """The ``Generator`` of ``engine/base.py``, which samples from the training model itself."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        groups: Groups,
        *,
        vocabulary: int,
        pad_id: int,
        eos_ids: Sequence[int],
        batch_size: int,
    ) -> None:
        """Allocates nothing before ``generate``.

        Args:
            chunks: this rank's bare part of the model (``build_chunks``).
            groups: the layout that the model was built in.
            vocabulary: true vocabulary size; columns beyond it are padding, which is never sampled.
            pad_id: fills ``Generation.tokens_BT`` after a row's end.
            eos_ids: tokens that end a response, as its last token; may be empty.
            batch_size: rows in the model at once, over all lanes.
        """
        if batch_size < 1:
            raise ValueError(f"rollout.batch_size: found {batch_size}, accepted: at least 1")
        self._chunks = list(chunks)
        self._groups = groups
        self._vocabulary = vocabulary
        self._pad_id = pad_id
        self._eos_ids = torch.tensor(list(eos_ids), dtype=torch.int64)
        self._batch_size = batch_size
        self._samples_here = bool(self._chunks[-1].post_process) and groups.layout.tensor_rank == 0
        # Only Megatron's own attention takes a padding mask on top of the causal one in prefill and decode.
        self._may_pad = any(isinstance(m, DotProductAttention) for m in self._chunks[0].modules())

    def update_weights(self) -> None:
        """Does nothing: the generator shares the training model's weights."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParameters,
        seed: int,
        watch: TokenWatcher | None = None,
    ) -> Generation:
        """Sample responses for token-id prompts. Collective over the replica's ranks.

        (``seed``, i) is the key of row i's random numbers, so replicas must pass different seeds.
        ``batch_size`` and the layout change results by rounding only.

        Raises:
            ValueError: no prompt, an empty prompt, a parameter out of range, or sequences longer than the
                model's sliding window.
        """
        self._check(prompts, sampling)
        count, steps = len(prompts), sampling.max_new_tokens
        results = Results(count, sampling, self._pad_id, self._samples_here, watch)
        uniform_BS = sampler.uniform_numbers(seed, count, steps)
        # Not inference_mode: Megatron caches rotary tables, which training uses, too.
        with torch.no_grad(), megatron_device(), _inference_state(self._chunks):
            for batch in self._batches(prompts):
                lanes = self._lanes(prompts, batch, steps)
                self._run(lanes, results, uniform_BS, sampling)
        return results.assemble(prompts, self._broadcast)

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters) -> None:
        sampler.check(sampling)
        if not prompts:
            raise ValueError("prompts: found none, accepted: at least one")
        empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
        if empty:
            raise ValueError(
                f"prompts: found no token in prompt {empty[0]}, accepted: at least one token each"
            )
        window = self._chunks[0].config.window_size
        longest = max(len(prompt) for prompt in prompts)
        if window is not None and longest + sampling.max_new_tokens > window[0] + 1:
            raise ValueError(
                f"max_new_tokens: found {sampling.max_new_tokens} after a prompt of {longest} tokens, "
                f"accepted: together at most {window[0] + 1}, the model's sliding window"
            )

    # -- batches -----------------------------------------------------------------------------------
    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Batches of at most ``batch_size`` requests, sorted so that equal prompts are neighbours."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        if self._may_pad:
            families = [order]
        else:
            families = [list(same) for _, same in groupby(order, key=lambda i: len(prompts[i]))]
        for family in families:
            for start in range(0, len(family), self._batch_size):
                yield family[start : start + self._batch_size]

    def _lanes(self, prompts: Sequence[Sequence[int]], batch: list[int], steps: int) -> list[_Lane]:
        parts = torch.tensor(batch).tensor_split(self._groups.layout.pipeline)
        return [
            self._lane(number, prompts, rows_B, steps) for number, rows_B in enumerate(parts) if len(rows_B)
        ]

    def _lane(self, number: int, prompts: Sequence[Sequence[int]], rows_B: Tensor, steps: int) -> _Lane:
        own = [list(prompts[row]) for row in rows_B.tolist()]
        columns = max(map(len, own))
        padding = [columns - len(prompt) for prompt in own]
        # A token of the row itself fills the padding: the mask hides it, and it adds no repetition penalty.
        history = [prompt[:1] * gap + prompt + [0] * steps for prompt, gap in zip(own, padding, strict=True)]
        return _Lane(
            number=number,
            rows_B=rows_B,
            history_BT=torch.tensor(history, device=device()),
            padding_B=torch.tensor(padding, device=device()),
            prompt_columns=columns,
            context=StaticInferenceContext(len(own), columns + steps),
        )

    # -- the loop ----------------------------------------------------------------------------------
    def _run(
        self, lanes: list[_Lane], results: Results, uniform_BS: Tensor, sampling: SamplingParameters
    ) -> None:
        """Sample all lanes, in the same order on all ranks: communication matches by order."""
        for step in range(sampling.max_new_tokens + 1):
            for number in range(len(self._chunks)):
                for lane in lanes:
                    if number == 0 and step > 0 and not lane.done:
                        self._accept(lane, self._receive_packet(lane), results)
                    if step < sampling.max_new_tokens and not lane.done:
                        logits_BV = self._prefill(lane, number) if step == 0 else self._decode(lane, number)
                        if logits_BV is not None:
                            uniform_B = uniform_BS[lane.rows_B, step].to(logits_BV.device)
                            history_BT = lane.history_BT[:, : lane.columns]
                            self._publish(lane, sampler.choose(logits_BV, history_BT, uniform_B, sampling))

    def _publish(self, lane: _Lane, choice: sampler.Choice) -> None:
        """Start the broadcast without waiting, so that this stage goes on with the next lane."""
        # float64 holds token ids and float32 exactly, so one message is enough.
        lane.packet_2B = torch.stack((choice.tokens_B.double(), choice.logprobs_B.double())).cpu()
        lane.kept_BV = choice.kept_BV
        if self._groups.replica.size() > 1:
            lane.publishing = self._broadcast(lane.packet_2B, later=True)

    def _receive_packet(self, lane: _Lane) -> Tensor:
        if lane.sending is not None:
            lane.sending[1].wait()
            lane.sending = None
        if not self._samples_here:
            received_2B = torch.empty(2, len(lane.rows_B), dtype=torch.float64)
            self._broadcast(received_2B)
            return received_2B
        if lane.publishing is not None:
            lane.publishing.wait()
        assert lane.packet_2B is not None
        return lane.packet_2B

    def _broadcast(self, tensor: Tensor, later: bool = False) -> dist.Work | None:
        """From the rank that samples to its replica; ``later`` returns at once, with what to wait for."""
        layout = self._groups.layout
        work: dist.Work | None = dist.broadcast(
            tensor,
            group=self._groups.replica,
            group_src=(layout.pipeline - 1) * layout.tensor,
            async_op=later,
        )
        return work

    def _accept(self, lane: _Lane, packet_2B: Tensor, results: Results) -> None:
        """Store one sampled token per row, and repack the lane if enough rows have finished."""
        tokens_B = packet_2B[0].long()
        lane.history_BT[:, lane.columns] = tokens_B.to(lane.history_BT.device)
        running_B = ~results.finished_B[lane.rows_B]
        rows_B = lane.rows_B[running_B]
        kept_BV = None if lane.kept_BV is None else lane.kept_BV[running_B.to(lane.kept_BV.device)]
        results.accept(rows_B, lane.step, packet_2B[:, running_B], kept_BV)
        results.finished_B[rows_B] = torch.isin(tokens_B[running_B], self._eos_ids)
        lane.step += 1
        left_B = (~results.finished_B[lane.rows_B]).nonzero().squeeze(-1)
        if len(left_B) <= (1 - _REPACK_FROM) * len(lane.rows_B):
            lane.keep(left_B)

    # -- the model ---------------------------------------------------------------------------------
    def _prefill(self, lane: _Lane, number: int) -> Tensor | None:
        """Prefill the KV cache of one chunk, with every distinct prompt of the lane once."""
        columns = lane.prompt_columns
        # The padding is part of the key, because its filler is a token. Equal prompts are neighbours.
        prompts_BC = torch.cat((lane.padding_B[:, None], lane.history_BT[:, :columns]), dim=1)
        distinct_UC, inverse_B = torch.unique_consecutive(prompts_BC, dim=0, return_inverse=True)
        columns_S = torch.arange(columns, device=prompts_BC.device)
        logits_UV = self._forward(lane, number, distinct_UC[:, 1:], columns_S, distinct_UC[:, 0])
        if number == len(self._chunks) - 1:
            _select_cache_rows(lane.context, inverse_B)
            lane.context.enable_decode_mode()
        return None if logits_UV is None else logits_UV[inverse_B]

    def _decode(self, lane: _Lane, number: int) -> Tensor | None:
        last = lane.columns - 1
        column_1 = torch.tensor([last], device=lane.history_BT.device)
        return self._forward(lane, number, lane.history_BT[:, last:][:, :1], column_1, lane.padding_B)

    def _forward(
        self, lane: _Lane, number: int, tokens_BS: Tensor, columns_S: Tensor, padding_B: Tensor
    ) -> Tensor | None:
        """Run chunk ``number`` on columns ``columns_S``. Returns logits [B, V] on the sampling rank."""
        model = self._chunks[number]
        rows, new = tokens_BS.shape
        if not model.pre_process:
            model.set_input_tensor(self._receive_hidden(lane, number, rows, new))
        output: Tensor = model(
            input_ids=tokens_BS,
            position_ids=(columns_S - padding_B[:, None]).clamp(min=0),
            attention_mask=_attention_mask(columns_S, padding_B) if self._may_pad else None,
            inference_context=lane.context,
            runtime_gather_output=True,
        )
        if number == len(self._chunks) - 1:
            lane.context.increment_sequence_len_offset(new)
        if not model.pre_process:
            model.set_input_tensor(None)
        if not model.post_process:
            self._send_hidden(lane, output)
            return None
        return output[:, -1, : self._vocabulary].float() if self._samples_here else None

    def _receive_hidden(self, lane: _Lane, number: int, rows: int, new: int) -> Tensor:
        config = self._chunks[number].config
        hidden = torch.empty(new, rows, config.hidden_size, dtype=config.params_dtype, device=device())
        group, source = self._neighbour(-1)
        dist.recv(hidden, group=group, src=source, tag=lane.number)
        return hidden

    def _send_hidden(self, lane: _Lane, hidden: Tensor) -> None:
        if lane.sending is not None:
            lane.sending[1].wait()
        group, target = self._neighbour(1)
        hidden = hidden.contiguous()
        work = dist.isend(hidden, group=group, dst=target, tag=lane.number)
        assert work is not None
        lane.sending = (hidden, work)  # the tensor must live until the send is complete

    def _neighbour(self, step: int) -> tuple[dist.ProcessGroup, int]:
        """The next (1) or previous (-1) stage's global rank, and the group to reach it by.

        The last stage reaches the first one, for its next chunk, by a group of its own: NCCL has one queue
        for both directions between two ranks, and they would wait for each other.
        """
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        position = pipeline.rank() + step
        closes_ring = not 0 <= position < pipeline.size()
        group = parallel_state.get_model_parallel_group() if closes_ring else pipeline
        return group, dist.get_global_rank(pipeline, position % pipeline.size())


def _attention_mask(columns_S: Tensor, padding_B: Tensor) -> Tensor | None:
    """bool ``[B, 1, S, K]``, True where a query (column of ``columns_S``) must not see a key.

    ``None`` if no row is padded: Megatron's default is causal attention.
    """
    if not bool(padding_B.any()):
        return None
    key_K = torch.arange(int(columns_S[-1]) + 1, device=columns_S.device)
    future_SK = key_K > columns_S[:, None]
    return (future_SK | (key_K < padding_B[:, None, None]))[:, None]


@contextmanager
def _inference_state(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Evaluation mode without sequence parallelism and without sliding window, all restored on exit.

    Sequence parallelism cannot split a single new token. Megatron's sliding window would replace the mask
    that hides the padding, and ``generate`` accepts only sequences within the window.
    """
    training = [chunk.training for chunk in chunks]
    config = chunks[0].config  # shared by all
    sequence_parallel = config.sequence_parallel
    saved: list[tuple[nn.Module, str, Any]] = []
    for module in (module for chunk in chunks for module in chunk.modules()):
        names = [name for name in _SEQUENCE_SWITCHES if name in vars(module)]
        if isinstance(module, FusedScaleMaskSoftmax):
            names.append("window_size")
        saved.extend((module, name, vars(module)[name]) for name in names)
    try:
        for chunk in chunks:
            chunk.eval()
        config.sequence_parallel = False
        for module, name, _ in saved:
            setattr(module, name, None if name == "window_size" else False)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
        config.sequence_parallel = sequence_parallel
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
