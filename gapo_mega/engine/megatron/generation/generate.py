"""Sampling from a Megatron model with a KV cache, over tensor and pipeline ranks.

A *lane* is a batch of left-padded rows that go through the model together. There are as many lanes at a time
as pipeline stages, so that every stage has work: while the last stage samples for one lane, the first stage
embeds another. With an interleaved pipeline all lanes pass through the first chunk of every stage before any
passes through the second. Three things keep the work small. The prefill reads a prompt that occurs several
times in a lane once and copies its KV cache. Only the last position is projected to the vocabulary. Finished
rows leave the lane.

Rotary positions are columns of the padded batch. Attention depends on their differences alone, so left
padding does not change it.

Who computes a chunk of the model is ``chunk.Chunk``: our decoder, or Megatron's layers where they are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.generation import layers
from gapo_mega.engine.megatron.generation import sampling as sampler
from gapo_mega.engine.megatron.generation.chunk import Chunk, Rows
from gapo_mega.engine.megatron.generation.decoder import Decoder
from gapo_mega.engine.megatron.generation.megatron_layers import (
    MegatronLayers,
    inference_state,
    takes_padding,
)
from gapo_mega.engine.megatron.generation.results import Results, block_of
from gapo_mega.engine.megatron.model import experts
from gapo_mega.engine.megatron.runtime.cpu import device, megatron_device
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.types import Generation, TokenWatcher
from gapo_mega.whereabouts import get_on

# Repack a lane once this share of its rows has finished. A row that leaves costs a copy of one row's cache,
# about as much as it saves in the next step; but oneDNN makes new kernels for every new number of rows.
_REPACK_FROM = 0.125


@dataclass
class _Lane:
    """Rows that go through the model together; finished rows leave."""

    number: int
    rows_B: Tensor  # int64, CPU: the requests that are still in the lane
    history_BT: Tensor  # int64, device: left-padded prompts, responses so far, and room for the rest
    padding_B: Tensor  # int64, device: columns of padding on the left
    prompt_columns: int
    parts: list[Rows] = field(default_factory=list)  # in this rank's chunks
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
        for part in self.parts:
            part.keep(on_device_B)


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
        gather: Callable[[], None] | None = None,
    ) -> None:
        """Allocates nothing before ``generate``.

        Args:
            chunks: this rank's bare part of the model (``build_chunks``).
            groups: the layout that the model was built in.
            vocabulary: true vocabulary size; columns beyond it are padding, which is never sampled.
            pad_id: fills ``Generation.tokens_BT`` after a row's end.
            eos_ids: tokens that end a response, as its last token; may be empty.
            batch_size: rows in the model at once, over all lanes.
            gather: called before every ``generate``, to bring the parameters up to date.
        """
        if batch_size < 1:
            raise ValueError(f"rollout.batch_size: found {batch_size}, accepted: at least 1")
        self._chunks = list(chunks)
        self._groups = groups
        self._vocabulary = vocabulary
        self._pad_id = pad_id
        self._eos_ids = torch.tensor(list(eos_ids), dtype=torch.int64)
        self._batch_size = batch_size
        self._draws = bool(self._chunks[-1].post_process) and groups.layout.tensor_rank == 0
        self._samples_here = self._draws
        self._gather = gather
        self._shares = False  # whether ranks that share sequences share out the prompts
        self._obstacles = [layers.obstacle(chunk) for chunk in self._chunks]
        self._may_pad = all(
            obstacle is None or takes_padding(chunk)
            for chunk, obstacle in zip(self._chunks, self._obstacles, strict=True)
        )
        layout = groups.layout
        if layout.tensor_rank == layout.data_rank == layout.context_rank == 0:
            layers.tell(self._obstacles)

    def update_weights(self) -> None:
        """Does nothing: the generator shares the training model's weights."""

    def rest(self) -> None:
        """Does nothing: memory beside the weights is let go of after every call."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParameters,
        seed: int,
        watch: TokenWatcher | None = None,
    ) -> Generation:
        """Sample responses for token-id prompts. Collective over the replica's ranks.

        (``seed``, i) is the key of row i's random numbers, so replicas must pass different seeds.
        ``batch_size`` and the layout change results by rounding only. Data ranks that share experts wait for
        each other at every token; they pass the same ``sampling``. Ranks that share sequences answer some
        prompts each, and ``watch`` hears of these; with top-k or top-p all of them answer all prompts.

        Raises:
            ValueError: no prompt, an empty prompt, a parameter out of range, or sequences longer than the
                model's sliding window.
        """
        self._check(prompts, sampling)
        steps = sampling.max_new_tokens
        layout = self._groups.layout
        self._shares = layout.context > 1 and not sampling.cuts
        self._samples_here = self._draws and (self._shares or layout.context_rank == 0)
        batches = list(self._batches(prompts))
        taken = [*prompts, *(self._fill(batches, prompts) if self._groups.layout.in_step else [])]
        results = Results(len(taken), sampling, self._pad_id, self._samples_here, watch)
        results.finished_B[len(prompts) :] = True
        uniform_BS = sampler.uniform_numbers(seed, len(taken), steps)
        with torch.no_grad(), self._prepared() as chunks:
            for batch in batches:
                lanes = self._lanes(taken, batch, steps)
                self._run(chunks, lanes, results, uniform_BS, sampling)
        if self._shares:
            results.exchange(self._groups.context)
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

    @contextmanager
    def _prepared(self) -> Iterator[list[Chunk]]:
        """The chunks with the parameters of now. Not in inference mode: Megatron keeps rotary tables."""
        if self._gather is not None:
            with megatron_device():
                self._gather()
        if not any(self._obstacles):
            yield [Decoder(model) for model in self._chunks]
            return
        assert self._groups.layout.context == 1, "Megatron's layers see this rank's positions alone"
        with inference_state(self._chunks):
            yield [
                Decoder(model) if obstacle is None else MegatronLayers(model)
                for model, obstacle in zip(self._chunks, self._obstacles, strict=True)
            ]

    # -- batches -----------------------------------------------------------------------------------
    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Batches of at most ``batch_size`` requests of this rank, equal prompts beside each other."""
        numbers = range(len(prompts))
        if self._shares:
            rank, ranks = self._groups.layout.context_rank, self._groups.layout.context
            numbers = block_of(len(prompts), rank, ranks) or range(1)
        order = sorted(numbers, key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        if self._may_pad:
            families = [order]
        else:
            families = [list(same) for _, same in groupby(order, key=lambda i: len(prompts[i]))]
        for family in families:
            for start in range(0, len(family), self._batch_size):
                yield family[start : start + self._batch_size]

    def _fill(self, batches: list[list[int]], prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Requests behind ``prompts`` that give all data ranks as many batches and lanes. Nobody reads them.

        Adds to ``batches``.
        """
        fillers: list[Sequence[int]] = []
        batches += [[] for _ in range(experts.most_among_sharers(len(batches)) - len(batches))]
        for batch in batches:
            like = prompts[batch[0] if batch else 0]  # a batch may have to be of one length
            while len(batch) < self._groups.layout.pipeline:
                batch.append(len(prompts) + len(fillers))
                fillers.append(like)
        return fillers

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
        )

    # -- the loop ----------------------------------------------------------------------------------
    def _run(
        self,
        chunks: list[Chunk],
        lanes: list[_Lane],
        results: Results,
        uniform_BS: Tensor,
        sampling: SamplingParameters,
    ) -> None:
        """Sample all lanes, in the same order on all ranks: communication matches by order."""
        for step in range(sampling.max_new_tokens + 1):
            get_on()
            for number, chunk in enumerate(chunks):
                for lane in lanes:
                    if number == 0 and step > 0 and not lane.done:
                        self._accept(lane, self._receive_packet(lane), results)
                    if step < sampling.max_new_tokens and not lane.done:
                        output = (
                            self._prefill(lane, chunk) if step == 0 else self._decode(lane, chunk, number)
                        )
                        logits_BV = self._pass_on(lane, chunk, output)
                        if logits_BV is not None:
                            uniform_B = uniform_BS[lane.rows_B, step].to(logits_BV.device)
                            history_BT = lane.history_BT[:, : lane.columns]
                            self._publish(lane, sampler.choose(logits_BV, history_BT, uniform_B, sampling))

    def _publish(self, lane: _Lane, choice: sampler.Choice) -> None:
        """Start the broadcast without waiting, so that this stage goes on with the next lane."""
        # float64 holds token ids and float32 exactly, so one message is enough.
        lane.packet_2B = torch.stack((choice.tokens_B.double(), choice.logprobs_B.double())).cpu()
        lane.kept_BV = choice.kept_BV
        if self._listeners.size() > 1:
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
        """From the rank that samples to all with its rows; ``later`` returns what to wait for, at once."""
        layout = self._groups.layout
        source = (layout.pipeline - 1) * layout.tensor if self._shares else layout.first_of_last_stage
        work: dist.Work | None = dist.broadcast(
            tensor, group=self._listeners, group_src=source, async_op=later
        )
        return work

    @property
    def _listeners(self) -> dist.ProcessGroup:
        return self._groups.copy if self._shares else self._groups.replica

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
        if self._groups.layout.in_step and experts.most_among_sharers(len(left_B)) and not len(left_B):
            left_B = torch.zeros(1, dtype=torch.int64)  # a finished row goes on for the others' sake
        if len(left_B) <= (1 - _REPACK_FROM) * len(lane.rows_B):
            lane.keep(_closed_up(left_B))

    # -- the model ---------------------------------------------------------------------------------
    def _prefill(self, lane: _Lane, chunk: Chunk) -> Tensor:
        """Have a chunk read every different prompt of the lane once."""
        columns = lane.prompt_columns
        # The padding is part of the key, because its filler is a token. Equal prompts are neighbours.
        prompts_BC = torch.cat((lane.padding_B[:, None], lane.history_BT[:, :columns]), dim=1)
        distinct_UC, inverse_B = torch.unique_consecutive(prompts_BC, dim=0, return_inverse=True)
        inputs = distinct_UC[:, 1:]
        if not chunk.takes_tokens:
            inputs = self._receive_hidden(lane, len(distinct_UC), columns)
        room = lane.history_BT.shape[1] - 1  # no chunk reads the last token
        output, rows = chunk.prefill(inputs, distinct_UC[:, 0], inverse_B, room)
        lane.parts.append(rows)
        return output[inverse_B] if chunk.gives_logits else output

    def _decode(self, lane: _Lane, chunk: Chunk, number: int) -> Tensor:
        inputs = lane.history_BT[:, lane.columns - 1 : lane.columns]
        if not chunk.takes_tokens:
            inputs = self._receive_hidden(lane, len(lane.rows_B), 1)
        return lane.parts[number].decode(inputs)

    def _pass_on(self, lane: _Lane, chunk: Chunk, output: Tensor) -> Tensor | None:
        """Send hidden states to the next stage. Returns logits ``[B, V]`` on the rank that samples."""
        if not chunk.gives_logits:
            self._send_hidden(lane, output)
            return None
        return output[:, : self._vocabulary] if self._samples_here else None

    def _receive_hidden(self, lane: _Lane, rows: int, new: int) -> Tensor:
        config = self._chunks[0].config
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


def _closed_up(left_B: Tensor) -> Tensor:
    """The rows ``left_B`` (ascending) in an order in which as many as possible stay in their place."""
    count = len(left_B)
    order_B = torch.arange(count)
    gaps_B = ~torch.isin(order_B, left_B)
    order_B[gaps_B] = left_B[left_B >= count]
    return order_B
