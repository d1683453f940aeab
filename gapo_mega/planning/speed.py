"""How fast a step could be on GPUs that nobody has tried: a ceiling from data sheets, not a measurement.

Every pass over whole sequences takes ``FLOPs / (devices x peak x utilisation)``, a pipeline's bubble added.
Every sampled token takes what is the longer of its FLOPs and the bytes that it reads (this rank's weights,
those of experts that any of the tokens goes through, and the keys and values of all sequences that are
sampled together) over the memory's bandwidth. With
``rollout.ahead`` rollout and the rest of a step take place at the same time, on as many devices each: servers
that shared those of the training would take its time. Left out:
communication, launches of kernels, the wait for the longest response, rewards, the optimizer, and the export
of weights. A real step takes longer, by a factor that only a measurement tells.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from gapo_mega.config import ParallelConfig
from gapo_mega.models.adapters import layer_parameters
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning import devices
from gapo_mega.planning.chunks import logits_chunk
from gapo_mega.planning.devices import Device
from gapo_mega.planning.flops import StepFlops, TransformerShape, step_flops
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.planning.strategy import sequences_answered

UTILISATION = 0.4  # of the peak, in passes over whole sequences
_BANDWIDTH = 0.7  # of the memory's bandwidth, in steps of generation
_ROLLOUT = "rollout"  # the phase
_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: int
    response: int


LEFT_OUT = (
    f"A ceiling from data sheets, at {UTILISATION:.0%} of the peak and {_BANDWIDTH:.0%} of the memory's "
    "bandwidth, not a measurement: communication, launches, the wait for the longest response, rewards, the "
    "optimizer and evaluations are left out."
)


@dataclass(frozen=True)
class Speed:
    """Seconds of a step by phase, and what follows.

    Attributes:
        devices: of the training, and of the servers where those are beside it.
        beside: whether the responses of a step are drawn while an earlier one trains.
    """

    device: str
    devices: int
    beside: bool
    lengths: Lengths
    sequences: int  # of a step
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        training = sum(seconds for phase, seconds in self.phases.items() if phase != _ROLLOUT)
        rollout = self.phases[_ROLLOUT]
        return max(rollout, training) if self.beside else rollout + training

    @property
    def tokens_per_second_per_device(self) -> float:
        """Prompts and responses."""
        tokens = self.sequences * (self.lengths.prompt + self.lengths.response)
        return tokens / self.seconds / self.devices

    def line(self) -> str:
        """In words."""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items())
        shared = " (half of them for the servers)" if self.beside else ""
        parts += "; the rollout beside the others" if self.beside else ""
        return (
            f"at most {self.tokens_per_second_per_device:.0f} tokens/s/GPU on {self.devices} x {self.device}"
            f"{shared}, with {self.lengths.prompt} tokens a prompt and {self.lengths.response} a response: "
            f"{self.seconds:.1f} s a step ({parts})"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ceiling": {
                "device": self.device,
                "devices": self.devices,
                "rollout_beside": self.beside,
                "prompt_tokens": self.lengths.prompt,
                "response_tokens": self.lengths.response,
                "tokens_per_second_per_device": self.tokens_per_second_per_device,
                "seconds_per_step": self.seconds,
                "phases_seconds": self.phases,
            }
        }


def flops_of(resolved: ResolvedRun, lengths: Lengths) -> StepFlops:
    """Operations of one step whose sequences are all of these lengths.

    Only the attention term, a small one, is not linear in them.
    """
    config, shape, lora = resolved.config, resolved.shape, resolved.config.model.lora
    count = step_flops(
        TransformerShape.of(shape, shape.vocab, 0 if lora is None else layer_parameters(shape, lora)),
        [(lengths.prompt, lengths.response)] * config.sequences(),
        resolved.passes,
        ppo_epochs=config.algorithm.ppo_epochs,
        recompute=config.model.recompute,
        chunked=not resolved.shared and logits_chunk(config, shape) > 0,  # a shared graph keeps all logits
        critic=TransformerShape.of(shape, resolved.value_heads) if resolved.critic is not None else None,
    )
    count = dataclasses.replace(count, critic=count.critic * resolved.value_models)
    if config.algorithm.old_logprobs == "generator":
        count = dataclasses.replace(count, old_logprobs=0)
    return count


def ceiling(
    resolved: ResolvedRun, name: str, prompt: int | None = None, response: int | None = None
) -> Speed:
    """The ceiling of a step of ``resolved`` on devices of this name, one of ``devices.NAMES``.

    ``prompt``, ``response``: mean tokens; the most that the run allows where they are left out.
    """
    device, config = devices.known(name), resolved.config
    assert device is not None, name
    lengths = Lengths(prompt or config.data.max_prompt_tokens, response or config.rollout.max_new_tokens)
    flops = flops_of(resolved, lengths)
    parallel = config.parallel
    bubble = 1 + (parallel.pipeline - 1) / (resolved.microbatches * parallel.virtual_pipeline)
    rate = resolved.world * device.peak_flops * UTILISATION
    passes = {
        "log-probabilities": flops.old_logprobs + flops.reference,
        "update": flops.update + flops.recompute,
        "critic": flops.critic,
    }
    phases = {_ROLLOUT: _generation_seconds(resolved, device, lengths)}
    phases |= {phase: count * bubble / rate for phase, count in passes.items() if count}
    beside = config.rollout.ahead > 0
    count = resolved.world * (2 if beside else 1)
    return Speed(name, count, beside, lengths, config.sequences(), phases)


def _generation_seconds(resolved: ResolvedRun, device: Device, lengths: Lengths) -> float:
    """Of one data-parallel rank, whose pipeline stages take turns at every token."""
    config, shape = resolved.config, resolved.shape
    own = sequences_answered(config, resolved.data)
    together = min(own, config.rollout.batch_size)
    size = _BYTES[config.model.dtype]
    layers = TransformerShape.of(shape, shape.vocab)
    weights = weights_read(shape, config.parallel, together) * size
    cached_token = 2 * shape.num_layers * shape.kv_groups * shape.head_dim * size / config.parallel.tensor
    # The mean context of a response's tokens: all that is read is linear in it.
    context = lengths.prompt + lengths.response / 2
    read = (weights + together * context * cached_token) / (device.bandwidth * _BANDWIDTH)
    pairs = 4 * shape.num_layers * shape.heads * shape.head_dim * context
    counted = together * (2 * layers.matmul_parameters + pairs) / config.parallel.tensor
    token = max(read, counted / (device.peak_flops * UTILISATION))
    prompts = together * 2 * lengths.prompt * shape.num_layers * layers.layer_matmul_parameters
    prefill = prompts / config.parallel.tensor / (device.peak_flops * UTILISATION)
    return math.ceil(own / together) * (prefill + lengths.response * token)


def weights_read(shape: ModelShape, parallel: ParallelConfig, together: int) -> float:
    """Parameters that a rank reads for one token of each of ``together`` sequences.

    Of experts those that some token goes through: where each of n tokens chooses k of E, evenly and
    independently, these are ``E (1 - (1 - k / E)^n)`` of a layer on average.
    """
    layers = TransformerShape.of(shape, shape.vocab)
    mlp = 3 * shape.hidden * shape.ffn
    others = layers.matmul_parameters - shape.num_layers * layers.mlps * mlp
    touched = 1.0
    if shape.experts is not None:
        tokens = together * parallel.sharing / parallel.tensor  # of all ranks that share these experts
        missed = (1 - shape.experts.chosen / shape.experts.count) ** tokens
        touched = shape.experts.count * (1 - missed)
    return others / parallel.tensor + shape.num_layers * touched * mlp / parallel.sharing
