"""What Megatron needs to know to build a model, read from a Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token goes through some of a layer's MLPs, which a router chooses.

    Attributes:
        count: MLPs of a layer.
        chosen: those that a token goes through, the likeliest by a softmax over all.
        normalized: the probabilities of the chosen ones are divided by their sum.
    """

    count: int
    chosen: int
    normalized: bool


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer: RMSNorm before each block, rotary positions, gated SiLU MLP.

    Attributes:
        family: name of the ``gapo_mega.models`` family that the model belongs to.
        num_layers: decoder layers.
        hidden: width of the residual stream.
        ffn: width of the MLP, or of one expert, for the gate and for the up projection each.
        heads: query heads.
        kv_groups: key/value heads; ``heads`` is a multiple of it.
        head_dim: width of one head; ``heads * head_dim`` may differ from ``hidden``.
        vocab: rows of the embedding, without padding.
        tied: the output layer is the embedding.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        qkv_bias: Q, K and V projections carry a bias; no other layer does.
        max_positions: longest sequence that the model was trained for.
        sliding_window: a token attends to itself and the ``sliding_window - 1`` tokens before it;
            ``None``: to all before it. Sequences up to this length are not affected by it.
        qk_norm: queries and keys go through an RMSNorm of their own over ``head_dim``, before the rotation.
        rope_scaling_factor: low rotary frequencies are divided by it as in Llama 3.1, with that model's
            other constants; ``None``: no frequency is scaled.
        experts: of every layer; ``None``: a layer has one MLP.
    """

    family: str
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab: int
    tied: bool
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    max_positions: int
    sliding_window: int | None = None
    qk_norm: bool = False
    rope_scaling_factor: float | None = None
    experts: Experts | None = None

    @property
    def mlps(self) -> int:
        """MLPs of a layer."""
        return 1 if self.experts is None else self.experts.count

    @property
    def router(self) -> int:
        """Parameters of a layer's router; 0 where it has none."""
        return 0 if self.experts is None else self.experts.count * self.hidden

    @property
    def longest(self) -> int:
        """Most tokens of a sequence that full attention computes as the model means it."""
        return min(self.max_positions, self.sliding_window or self.max_positions)

    def padded_vocab(self, multiple: int) -> int:
        """``vocab`` rounded up to a multiple, so that tensor-parallel ranks hold equal parts."""
        return -(-self.vocab // multiple) * multiple
