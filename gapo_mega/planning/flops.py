"""Floating-point operations of a training step, and the share of the hardware's peak that they reach.

A multiplication with an addition counts as 2. The count has the matrix products of a Llama-like decoder
(gated feed-forward, grouped-query attention) on real tokens. It leaves out padding, norms, softmax, rotary
embedding, the embedding look-up, the optimizer, the Gram matrix (m (m + 1) N) and the combination (2 m N).

Forward of one sequence of T tokens, with d hidden, f feed-forward, h heads, k key-value groups of size c, L
layers and V outputs (vocabulary, or value heads of a critic):

    2 T [ L (d h c + 2 d k c + h c d + 3 d f) + d V ]   projections, feed-forward, output layer
    + 4 L h c T (T + 1) / 2                              scores and values over the visible token pairs

Where a token goes through k of E experts, 3 d f is 3 k d f + E d: only what a token uses counts.

The backward pass is twice the forward: one product for the input's gradient, one for the weight's. With
adapters (LoRA) the forward has the products with A and B beside each adapted one, the reference has none, and
frozen weights have no product for a gradient of their own.

The count is an upper bound of what the engine does with real tokens: the output layer counts at every token,
and the engine computes it where response tokens are predicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from gapo_mega.config.strategies import PassCount
from gapo_mega.models.shape import ModelShape

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class TransformerShape:
    """The sizes that the count depends on.

    ``outputs``: vocabulary, or the value heads of a critic. ``mlps``: those that a token goes through.
    ``router``: outputs of a layer's router. ``adapters``: trained parameters of one layer's adapters,
    everything else being frozen; 0: there are none, and everything is trained.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    outputs: int
    mlps: int = 1
    router: int = 0
    adapters: int = 0

    @classmethod
    def of(cls, shape: ModelShape, outputs: int, adapters: int = 0) -> TransformerShape:
        """The sizes of a model."""
        experts = shape.experts
        return cls(
            layers=shape.num_layers,
            hidden=shape.hidden,
            ffn=shape.ffn,
            heads=shape.heads,
            kv_groups=shape.kv_groups,
            head_dim=shape.head_dim,
            outputs=outputs,
            mlps=1 if experts is None else experts.chosen,
            router=0 if experts is None else experts.count,
            adapters=adapters,
        )

    @property
    def layer_matmul_parameters(self) -> int:
        """Parameters of one layer that take part in a token's matrix products."""
        return self.frozen_layer_parameters + self.adapters

    @property
    def frozen_layer_parameters(self) -> int:
        """Those that are not the adapters'."""
        query_and_output = 2 * self.hidden * self.heads * self.head_dim
        key_and_value = 2 * self.hidden * self.kv_groups * self.head_dim
        mlp = self.hidden * (3 * self.ffn * self.mlps + self.router)
        return query_and_output + key_and_value + mlp

    @property
    def matmul_parameters(self) -> int:
        """Those of all layers and of the output layer; the embedding look-up is no matrix product."""
        return self.layers * self.layer_matmul_parameters + self.hidden * self.outputs


def attention_flops(shape: TransformerShape, length: int, causal: bool = True) -> int:
    """Scores and weighted values of one sequence over all layers.

    A token sees itself and those before it: T (T + 1) / 2 pairs. ``causal=False`` counts all T^2, which is
    what a kernel that masks instead of skipping computes.
    """
    pairs = length * (length + 1) // 2 if causal else length * length
    return 4 * shape.layers * shape.heads * shape.head_dim * pairs


def forward_flops(shape: TransformerShape, length: int, causal: bool = True) -> int:
    """One forward pass over one sequence of ``length`` tokens, output layer on every token."""
    return 2 * length * shape.matmul_parameters + attention_flops(shape, length, causal)


def backward_flops(shape: TransformerShape, length: int, causal: bool = True) -> int:
    """One backward pass over one sequence of ``length`` tokens."""
    whole = 2 * forward_flops(shape, length, causal)
    if not shape.adapters:
        return whole
    frozen = shape.layers * shape.frozen_layer_parameters + shape.hidden * shape.outputs
    return whole - 2 * length * frozen


def generation_flops(shape: TransformerShape, prompt_length: int, response_length: int) -> int:
    """Sampling ``response_length`` >= 1 tokens with a key-value cache.

    The last token is never fed back, and the output layer is needed once per sampled token.
    """
    fed = prompt_length + response_length - 1
    layers = 2 * fed * shape.layers * shape.layer_matmul_parameters
    return layers + 2 * response_length * shape.hidden * shape.outputs + attention_flops(shape, fed)


@dataclass(frozen=True)
class StepFlops:
    """Operations of one training step over all ranks, by phase."""

    rollout: int
    old_logprobs: int
    reference: int
    update: int
    critic: int
    recompute: int

    @property
    def model(self) -> int:
        """What the algorithm needs: the numerator of the model FLOPs utilisation (MFU)."""
        return self.rollout + self.old_logprobs + self.reference + self.update + self.critic

    @property
    def hardware(self) -> int:
        """What the hardware does, recomputation included: the numerator of hardware utilisation (HFU)."""
        return self.model + self.recompute


def step_flops(
    shape: TransformerShape,
    lengths: Iterable[tuple[int, int]],
    passes: PassCount,
    *,
    ppo_epochs: int = 1,
    recompute: Recompute = "none",
    chunked: bool = False,
    critic: TransformerShape | None = None,
) -> StepFlops:
    """Operations of one rollout step and its updates.

    ``lengths`` holds (prompt tokens, response tokens) of every sequence of the step over all ranks. The
    policy runs ``passes`` an epoch, as its gradient strategy needs; old and reference log-probabilities
    take one forward each. A critic takes one forward for the values, and one forward and backward an epoch.
    Recomputation repeats the layers' forward (full) or their attention (selective) once per policy backward;
    so is the output layer where logits come in chunks (``chunked``).
    """
    assert passes.forwards >= 1 and passes.backwards >= 1 and ppo_epochs >= 1, (passes, ppo_epochs)
    pairs = list(lengths)
    totals = [prompt + response for prompt, response in pairs]
    forward = sum(forward_flops(shape, total) for total in totals)
    backward = sum(backward_flops(shape, total) for total in totals)
    attention = sum(attention_flops(shape, total) for total in totals)
    output_layer = 2 * sum(totals) * shape.hidden * shape.outputs
    repeated = {"none": 0, "selective": attention, "full": forward - output_layer}[recompute]
    if chunked:
        repeated += output_layer
    critic_forward = sum(forward_flops(critic, total) for total in totals) if critic else 0
    return StepFlops(
        rollout=sum(generation_flops(shape, prompt, response) for prompt, response in pairs),
        old_logprobs=forward,
        reference=sum(forward_flops(replace(shape, adapters=0), total) for total in totals),
        update=(passes.forwards * forward + passes.backwards * backward) * ppo_epochs,
        critic=critic_forward * (1 + 3 * ppo_epochs),
        recompute=repeated * passes.backwards * ppo_epochs,
    )


def mfu(flops: float, seconds: float, devices: int, peak_flops: float) -> float:
    """flops / (seconds x devices x peak_flops): the share, in [0, 1], of the peak that was used."""
    if min(seconds, devices, peak_flops) <= 0:
        raise ValueError(
            f"seconds, devices, peak_flops: found {seconds}, {devices}, {peak_flops}, "
            "accepted: positive numbers"
        )
    return flops / (seconds * devices * peak_flops)
