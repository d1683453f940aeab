"""Activations of a training pass at their peak, by going through Megatron's layers with a counter.

What autograd keeps of one layer of Megatron's local specification, in bytes per rank and microbatch, with B
sequences of T tokens, d hidden, h heads and k groups of size c, f feed-forward, t tensor-parallel size, e
bytes of the compute type (2 for bf16, 4 for fp32):

    norms       2 x (4 + 2 e) B T d          input in fp32, normed, scaled (/ t with sequence parallelism)
    projection  e B T h c / t                rotated queries
                2 e B T h c / t              keys and values, repeated for every head of their group
                e B T (h + 3 k) c / t        instead, if h = k or with selective recomputation: the projection
                                             as it came out, and rotated keys
    head norms  (4 + e) B T (h + k) c / t    with norms of queries and keys: inputs in fp32, normed. If that
                                             is the compute type, the inputs are the projection itself (kept
                                             once) and, if k < h, a copy of the queries
    rotary      4 e T c                      cosines and sines, scaled
    scores      4 B T^2 h / t                softmax in fp32 (none with selective recomputation)
                2 B T^2 h / t, T^2           in bf16 also its copy; the mask (likewise)
    output      e B T h c / t                input of the output projection
    MLP         5 e B T f / t                gate and up, silu, up + 0, product

With experts, f is the width of all k that a token goes through, and e B T (k d + f) / t is added for tokens
in the order of their experts and the weighted products: an estimate, not yet measured, of tokens that are
spread evenly over ranks. Where R ranks share experts, the tokens of all R are e R B T d (/ t with sequence
parallelism): in Megatron's buffer, and once more while expert outputs or gradients go back to their order.

Full recomputation keeps e B T d a layer. A pipeline stage holds several microbatches at once, as
``schedule.py`` says, with the tensors that it received and sent. On the last stage the loss takes, with V
columns of the padded vocabulary on each of t ranks and N = B x response tokens,

    2 e N V / t                              logits, once as [T, B, V / t], which is freed before the loss,
    4 N V / t                                in bf16 their softmax; in fp32 it overwrites them,
    N V / t                                  with top-k or top-p: which tokens were left,
    20 H / t                                 with a repetition penalty: the H tokens before each of the N.

for the longest prompts and responses: an upper bound, as microbatches of shorter ones are trimmed. On top
comes what an operation needs while it runs: 16 B T^2 h / t behind fp32 scores (12 in bf16), 20 B T d in a
norm, 4 e B T f / t in the MLP, e N V / t behind the logits, the gradient of one weight (in bf16 also as
fp32). The peak may be at the end of the forward (much vocabulary), in the last layer's backward or, with
recomputation, in any layer's; with one graph for all objectives it is wherever an operation needs most,
because nothing is freed on the way, while the softmax and the logits' gradient, (4 + e) N V / t, stay.
Megatron also keeps a buffer of e B T^2 h / t for the products of queries and keys, or for gathered tokens.

Measured on the CPU (docs/memory.md), the prediction was within 1 % at 40 to 450 MiB, and within 5 % of
random models of 1 to 50 MB, in fp32 and bf16, all recomputation modes, tensor, sequence and pipeline
parallel. Below, uncounted memory shows: random-number states (5 kB a recomputed part), a few numbers per
token. Nor are buffers of the communication library counted. GPU kernels need less at some points (one kernel
for a norm's backward, Transformer Engine's attention without scores).
"""

from __future__ import annotations

from dataclasses import dataclass

from gapo_mega.config import Config
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.blocks import Block, Counter
from gapo_mega.planning.chunks import most_response_tokens
from gapo_mega.planning.schedule import schedule
from gapo_mega.planning.strategy import cuts

VOCABULARY_DIVISOR = 128  # the engine pads the vocabulary to this times the tensor-parallel size
FP32 = 4
_PENALTY = 20  # bytes for every token that a repetition penalty looks at: row, column, factor


@dataclass(frozen=True)
class Sizes:
    """Elements on one rank; tensors of one microbatch of full length, weights of one layer."""

    item: int  # bytes of an element of the compute type
    residual: int  # [T, B, d], or this rank's part with sequence parallelism
    hidden: int  # [T, B, d]
    query: int  # [T, B, h c / t]
    key: int  # [T, B, k c / t]
    repeated: int  # keys of all ranks' positions, for every head [T, B, h c / t]; 0: as they are
    ffn: int  # [T, B, f / t], for every expert that a token goes through
    routed: int  # tokens in the order of their experts, if there are any
    dispatched: int  # tokens of all ranks that share experts, if several do
    scores: int  # [B, h / t, T, T]
    mask: int  # [T, T], one byte each
    rotary: int  # [T, c]
    behind: int  # [R, B, d]: R positions, with all that predict a response token
    logits: int  # [R, B, V / t]
    chosen: int  # [N, V / t]: those that predict a response token
    waiting: int  # the output layer's gradient, to which that of another chunk is added; 0: it has one chunk
    qkv_weight: int  # of this and the next three: 0 where they are frozen
    projection_weight: int
    gate_weight: int  # gate and up together; down is half as large
    output_weight: int
    grouped: bool  # fewer groups than heads
    cut: bool  # top-k or top-p
    penalized: int  # tokens that the repetition penalty looks at
    split: bool  # over the sequence, between the linear layers
    qk_norm: bool  # of queries and keys

    @property
    def mixed(self) -> int:
        """Query, key and value before they are taken apart."""
        return self.query + 2 * self.key

    @property
    def gathered(self) -> int:
        """The whole sequence of a gradient that is split over the sequence."""
        return self.hidden if self.split else 0

    @property
    def bf16(self) -> bool:
        """Whether the compute type is not fp32."""
        return self.item != FP32


def activation_peak(
    config: Config, shape: ModelShape, stage: int, microbatches: int, shared: bool, chunk: int = 0
) -> int:
    """Bytes of one rank of pipeline ``stage`` above parameters, gradients and the like.

    ``microbatches``: of a minibatch. ``shared``: one graph is kept for the backwards of all objectives.
    ``chunk``: response tokens whose logits are there at once; 0: all.
    """
    sizes, parallel = sizes_of(config, shape, chunk), config.parallel
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    chunks = [
        _Pass(
            sizes,
            config.model.recompute,
            shape.num_layers // pipeline // virtual,
            receives=stage > 0 or number > 0,
            sends=stage < pipeline - 1 or number < virtual - 1,
            shared=shared,
        )
        for number in range(virtual)
    ]
    counter = Counter()
    # Megatron's buffer, allocated once.
    counter.hold(sizes.item * max(sizes.scores, sizes.gathered, sizes.dispatched))
    if (stage > 0 or virtual > 1) and microbatches > 1:  # received for and sent after the microbatch before
        counter.hold(2 * sizes.item * sizes.residual)
    for forward, number in schedule(pipeline, virtual, stage, microbatches):
        (chunks[number].forward if forward else chunks[number].backward)(counter)
    return counter.peak


def sizes_of(config: Config, shape: ModelShape, chunk: int = 0) -> Sizes:
    """Sizes for the configuration's longest sequences; ``chunk`` as for ``activation_peak``."""
    tensor, split, ranks = config.parallel.tensor, config.parallel.sequence_parallel, config.parallel.context
    length = config.longest
    length += -length % (2 * ranks * tensor if ranks > 1 else tensor if split else 1)
    own = length // ranks  # positions of a sequence on a rank
    rows, response = config.micro_batch_size, min(config.rollout.max_new_tokens, own)
    tokens, positions = rows * own, length
    outputs = rows * (response + (-response % tensor if split else 0))
    if config.micro_batch_tokens is not None:
        # One row, whose scores are those within its sequences: the most if all are of the longest.
        rows, tokens, outputs = 1, config.micro_batch_tokens, most_response_tokens(config)
        tokens, outputs = (n + (-n % tensor if split else 0) for n in (tokens, outputs))
        positions = tokens
    query, key = (n * shape.head_dim // tensor for n in (shape.heads, shape.kv_groups))
    columns = shape.padded_vocab(VOCABULARY_DIVISOR * tensor) // tensor
    # Frozen weights have no gradient; what adapters add, a few numbers per token and rank, is not counted.
    trained = shape.hidden if config.model.lora is None else 0
    part = min(chunk // rows * rows or rows, outputs) if chunk else outputs
    chosen = 1 if shape.experts is None else shape.experts.chosen
    residual, sharing = tokens // (tensor if split else 1) * shape.hidden, config.parallel.sharing
    return Sizes(
        item=2 if config.model.dtype == "bf16" else FP32,
        residual=residual,
        hidden=tokens * shape.hidden,
        query=tokens * query,
        key=tokens * key,
        # Transformer Engine's attention passes other ranks' keys round, and keeps less.
        repeated=tokens * ranks * query if ranks > 1 or shape.heads != shape.kv_groups else 0,
        ffn=tokens * chosen * shape.ffn // tensor,
        routed=tokens * chosen // tensor * shape.hidden if shape.experts is not None else 0,
        dispatched=residual * sharing if shape.experts is not None and sharing > 1 else 0,
        scores=tokens * length * shape.heads // tensor,
        mask=own * length,
        rotary=positions * shape.head_dim,
        behind=outputs * shape.hidden,
        logits=part * columns,
        chosen=min(part, most_response_tokens(config)) * columns,
        waiting=columns * trained if part < outputs else 0,
        qkv_weight=(query + 2 * key) * trained,
        projection_weight=query * trained,
        gate_weight=2 * shape.ffn // config.parallel.experts_split * trained,
        output_weight=columns * trained,
        grouped=shape.heads != shape.kv_groups,
        cut=cuts(config),
        penalized=_penalized(config) // tensor,
        split=split,
        qk_norm=shape.qk_norm,
    )


def _penalized(config: Config) -> int:
    """Tokens before a response token, itself not included, over all response tokens of a microbatch."""
    if config.rollout.repetition_penalty == 1.0:
        return 0
    tokens = most_response_tokens(config)
    return tokens * config.data.max_prompt_tokens + tokens * (config.rollout.max_new_tokens - 1) // 2


@dataclass(frozen=True)
class _Pass:
    """Forward and backward of one microbatch on a stage."""

    sizes: Sizes
    recompute: str
    layers: int
    receives: bool  # from the stage before
    sends: bool  # to the stage after
    shared: bool

    def forward(self, counter: Counter) -> None:
        z = self.sizes
        if self.receives and z.bf16:  # in fp32 it is the first norm's input
            counter.hold(z.item * z.residual)
        for _ in range(self.layers):
            if self.recompute == "full":
                counter.hold(z.item * z.residual)
            else:
                counter.forward(self._before())
                if self.recompute == "none":
                    counter.forward(_core(z, selective=False))
                counter.forward(_after(z))
        if self.sends:
            counter.hold(z.item * z.residual)

    def backward(self, counter: Counter) -> None:
        z = self.sizes
        if not self.sends:
            _loss(counter, z, self.shared)
        for _ in range(self.layers):
            if self.recompute == "full":
                self._recomputed_layer(counter)
                continue
            counter.backward(_after(z), self.shared)
            if self.recompute == "none":
                counter.backward(_core(z, selective=False), self.shared)
            else:
                _recomputed_core(counter, z)
            counter.backward(self._before(), self.shared)
        if not self.receives:  # the embedding's gradient is a dense one
            counter.touch(z.item * z.hidden + _weight_gradient(z, z.output_weight))

    def _before(self) -> list[Block]:
        return _before(self.sizes, self.recompute == "selective")

    def _recomputed_layer(self, counter: Counter) -> None:
        z = self.sizes
        blocks = [*self._before(), *_core(z, selective=False), *_after(z)]
        stream = z.item * z.residual
        own_input = 0 if z.bf16 else stream  # the layer's input is the first norm's, too
        counter.hold(stream - own_input)  # gradient of the layer's output
        counter.forward(blocks)
        counter.hold(stream)  # the output
        counter.backward(blocks)
        counter.hold(own_input - 2 * stream - (0 if self.shared else stream))


def _weight_gradient(z: Sizes, weight: int) -> int:
    """Bytes of a weight's gradient and, in bf16, of its fp32 copy while it is added to the buffer."""
    return (z.item + (FP32 if z.bf16 else 0)) * weight


def _linear(z: Sizes, saved: int, out: int, into: int, weight: int, beside: int) -> list[Block]:
    """A linear layer, by elements of its ``saved`` input, its output and input gradients, its ``weight``.

    ``beside``: bytes of other gradients that wait. The weight's gradient is added to the gradient buffer when
    the input is gone.
    """
    # With sequence parallelism the whole sequence's gradient is summed into one of this rank's part.
    scattered = z.residual if z.split and into == z.hidden else 0
    gradient = beside + z.item * (into + scattered)
    return [
        Block(0, 0, gradient + _weight_gradient(z, weight)),
        Block(z.item * saved, z.item * (saved + out), gradient + z.item * (out + weight)),
    ]


def _norm(z: Sizes, beside: int) -> list[Block]:
    waiting = beside if z.bf16 else 0  # in fp32 the result is added to the other gradient at once
    normed = z.item * z.residual
    return [
        Block(FP32 * z.residual, 2 * FP32 * z.residual, 5 * FP32 * z.residual + waiting),
        Block(normed, 2 * normed, beside + 3 * normed),
    ]


def _before(z: Sizes, selective: bool) -> list[Block]:
    """Norm, projection and rotation of queries and keys."""
    e, stream = z.item, z.item * z.residual
    keys = z.key if selective or not z.repeated else 0  # else repeated before they are kept
    rotated = e * (z.query + keys + 4 * z.rotary)
    kept = e * z.mixed if selective else 0  # the values are a view of it
    return [
        *_norm(z, stream),
        *_linear(z, z.residual, z.mixed, z.hidden, z.qkv_weight, stream),
        *(_head_norms(z, selective, stream) if z.qk_norm else []),
        Block(kept + rotated, e * z.mixed + 2 * rotated, stream + 2 * e * z.mixed),
    ]


def _head_norms(z: Sizes, selective: bool, beside: int) -> list[Block]:
    """Norms of queries and keys, whose inputs are parts of the projection."""
    both, normed = z.query + z.key, z.item * (z.query + z.key)
    if z.bf16:
        inputs = FP32 * both
    else:  # queries are copied where they lie apart, and the keys' view keeps the projection
        inputs = z.item * (z.query if z.grouped else 0)
        inputs += _projection_for_norms(z, selective)
    gradients = beside + z.item * z.mixed
    return [
        Block(inputs, inputs + FP32 * both, gradients + 5 * FP32 * z.query),
        Block(normed, 2 * normed, gradients + 3 * normed),
    ]


def _projection_for_norms(z: Sizes, selective: bool) -> int:
    """Bytes of the projection where the norms of queries and keys keep it until their own backward."""
    kept = z.qk_norm and not z.bf16 and not selective  # with selective recomputation it is kept anyway
    return z.item * z.mixed if kept else 0


def _core(z: Sizes, selective: bool) -> list[Block]:
    """Scores, softmax, weighted sum of the values; ``selective``: recomputed by themselves."""
    e, s = z.item, z.scores
    query, beside = e * z.query, e * (z.residual + z.query)
    repeated = e * z.repeated
    # Variables of the forward keep the projection alive; without groups the values are a view of it.
    already = _projection_for_norms(z, selective)
    frame = 0 if selective else e * (z.mixed + (z.query + z.key if z.grouped else 0)) - already
    values = repeated if z.repeated or selective else e * z.mixed - already
    blocks = [
        Block(repeated, frame + 2 * repeated, beside + 3 * query + e * s),  # keys; products
        # In fp32 the mask is written into a view, whose backward makes four copies.
        Block(z.mask, frame + z.mask + e * s, beside + (8 if z.bf16 else 16) * s),
        Block(FP32 * s, frame + (10 if z.bf16 else 8) * s, beside + 8 * s),  # softmax
    ]
    if z.bf16:
        blocks.append(Block(e * s, frame + 8 * s, beside + 6 * s))
    weighted = Block(values, frame + repeated + e * s + 2 * query, beside + 2 * query + e * s)
    return [*blocks, weighted]


def _after(z: Sizes) -> list[Block]:
    """Output projection, norm, MLP."""
    e, stream = z.item, z.item * z.residual
    others = e * z.dispatched  # before tokens are in order, and after: of all ranks
    return [
        *_linear(z, z.query, z.gathered, z.query, z.projection_weight, stream),
        *_norm(z, stream),
        *([Block(e * (z.routed + z.ffn), e * z.routed, stream + others)] if z.routed else []),
        *_linear(z, z.residual, 2 * z.ffn, z.hidden, z.gate_weight, stream),
        Block(2 * e * z.ffn, 2 * e * z.ffn, stream + 4 * e * z.ffn),  # gate and up
        Block(2 * e * z.ffn, 2 * e * z.ffn, stream + 3 * e * z.ffn),  # silu, up + 0
        *_linear(z, z.ffn, z.gathered, z.ffn, z.gate_weight // 2, stream),
        *([Block(0, others, stream + others)] if z.dispatched else []),
    ]


def _recomputed_core(counter: Counter, z: Sizes) -> None:
    blocks = _core(z, selective=True)
    extra = 2 * z.item * z.query  # the output and its gradient
    counter.hold(z.item * z.query)
    counter.forward(blocks)
    counter.hold(z.item * z.query)
    counter.backward(blocks)
    counter.hold(-extra)


def _loss(counter: Counter, z: Sizes, shared: bool) -> None:
    """Last norm, logits and loss, forward and backward."""
    e = z.item
    norm = _norm(z, 0)
    counter.forward(norm)
    own = e * z.behind * z.residual // z.hidden
    counter.hold(own)  # the output layer's input; that at other positions is there meanwhile
    counter.touch(e * (z.residual + max(2 * z.logits, z.gathered)))
    counter.hold(e * z.waiting)
    softmax = FP32 * z.chosen if z.bf16 else 0
    counter.hold(_PENALTY * z.penalized)
    counter.touch(e * z.chosen + softmax + (z.chosen if z.cut else 0))
    # With one graph, the softmax and a gradient are there; else one overwrites the other.
    counter.touch((2 if shared else 1) * FP32 * z.chosen + (e * z.chosen if z.bf16 else 0))
    counter.hold((FP32 + e) * z.chosen if shared else -_PENALTY * z.penalized)
    counter.touch((0 if shared else FP32 * z.chosen) + e * z.logits)
    accumulate, linear = _linear(z, 0, z.logits, z.behind, z.output_weight, 0)
    counter.touch(linear.backward + (own if z.split else 0))
    counter.hold(0 if shared else -own)
    counter.touch(max(accumulate.backward, e * (z.behind + z.hidden)))
    counter.hold(-e * z.waiting)
    counter.backward(norm, shared)
