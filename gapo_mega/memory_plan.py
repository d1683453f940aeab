"""Predicts the memory of a rank before anything is allocated.

Parameters, gradients and optimizer state follow from the shapes exactly, but for the padding of Megatron's
buckets (below 0.1 %). Activations are an estimate: per layer, token and sequence, in units of the compute
type,

    4 d                                inputs and outputs of the two norms
    + (2 h + 2 k) c / t                query, key, value and the attention's output
    + 4 f / t                          gate, up, the gate's activation and the product
    + 2 T h / t, and T h / t in fp32   scores, masked scores; softmax (none with selective recomputation)

with d hidden, h heads, k key-value groups of size c, f feed-forward, t tensor-parallel size (d is divided by
it with sequence parallelism) and T tokens. Full recomputation keeps d per layer and one layer's worth. A
pipeline stage holds up to ``pipeline - stage`` microbatches at once. The last stage adds the logits: 3 V / t
in fp32 (logits, their softmax, its gradient). What the attention kernels of Transformer Engine do not
materialise is not subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

from gapo_mega.config import Config, OptimizerConfig
from gapo_mega.layout_checks import data_parallel_size
from gapo_mega.models.shape import ModelShape

VOCABULARY_DIVISOR = 128  # the engine pads the vocabulary to this times the tensor-parallel size
FP32 = 4
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class StagePlan:
    """Bytes of one rank of a pipeline stage; all tensor and data ranks of a stage are alike."""

    stage: int
    policy_parameters: int  # elements
    parameters: int
    gradients: int
    optimizer: int
    objective_rows: int
    reference: int
    critic: int
    kv_cache: int
    activations: int

    @property
    def resident(self) -> int:
        """What is held all the time."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.objective_rows
            + self.reference
            + self.critic
        )

    @property
    def peak(self) -> int:
        """Generation and training do not overlap, so the larger of their two counts."""
        return self.resident + max(self.kv_cache, self.activations)


@dataclass(frozen=True)
class MemoryPlan:
    """The prediction of every pipeline stage."""

    stages: list[StagePlan]

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.peak for stage in self.stages)

    def table(self) -> str:
        """Rows of kinds, columns of pipeline stages, in GiB (MiB for small models)."""
        kinds = {
            "parameters": [s.parameters for s in self.stages],
            "gradients (fp32)": [s.gradients for s in self.stages],
            "optimizer state": [s.optimizer for s in self.stages],
            "rows of other objectives": [s.objective_rows for s in self.stages],
            "reference": [s.reference for s in self.stages],
            "critic": [s.critic for s in self.stages],
            "KV cache (generation)": [s.kv_cache for s in self.stages],
            "activations (training)": [s.activations for s in self.stages],
            "peak": [s.peak for s in self.stages],
        }
        unit, size = ("GiB", GIB) if self.peak >= GIB else ("MiB", MIB)
        lines = [f"{f'{unit} per rank':<26}" + "".join(f"{f'stage {s.stage}':>12}" for s in self.stages)]
        lines += [f"{kind:<26}" + "".join(f"{n / size:>12.2f}" for n in row) for kind, row in kinds.items()]
        return "\n".join(lines)


def predict(config: Config, shape: ModelShape, world_size: int) -> MemoryPlan:
    """The memory of every rank of ``world_size`` processes; the layout must have passed the layout checks."""
    data = data_parallel_size(config, world_size)
    return MemoryPlan([_stage(config, shape, data, stage) for stage in range(config.parallel.pipeline)])


def stage_parameters(shape: ModelShape, tensor: int, pipeline: int, stage: int) -> int:
    """Parameters of the language model on one rank of a stage, the padded vocabulary included."""
    total = _backbone_parameters(shape, tensor, pipeline, stage)
    holds_embedding_already = shape.tied and pipeline == 1
    if stage == pipeline - 1 and not holds_embedding_already:
        # Untied: the output layer. Tied over several stages: the last stage's copy of the embedding.
        total += _embedding_parameters(shape, tensor)
    return total


def critic_parameters(shape: ModelShape, tensor: int, pipeline: int, stage: int, heads: int) -> int:
    """Parameters of a value model: its linear head with bias is not split over tensor ranks."""
    head = heads * (shape.hidden + 1) if stage == pipeline - 1 else 0
    return _backbone_parameters(shape, tensor, pipeline, stage) + head


def _backbone_parameters(shape: ModelShape, tensor: int, pipeline: int, stage: int) -> int:
    query, key = shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
    split = shape.hidden * (query + 2 * key) + query * shape.hidden + 3 * shape.hidden * shape.ffn
    if shape.qkv_bias:
        split += query + 2 * key
    layer = split // tensor + 2 * shape.hidden  # norms are held by every tensor rank
    total = layer * (shape.num_layers // pipeline)
    if stage == 0:
        total += _embedding_parameters(shape, tensor)
    if stage == pipeline - 1:
        total += shape.hidden  # final norm
    return total


def _embedding_parameters(shape: ModelShape, tensor: int) -> int:
    return shape.padded_vocab(VOCABULARY_DIVISOR * tensor) // tensor * shape.hidden


def _stage(config: Config, shape: ModelShape, data: int, stage: int) -> StagePlan:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    item = _item_size(config)
    count = stage_parameters(shape, tensor, pipeline, stage)
    objectives = len(config.objectives)
    shard = count // data if config.optimizer.distributed else count
    return StagePlan(
        stage=stage,
        policy_parameters=count,
        parameters=count * item,
        gradients=count * FP32,
        optimizer=_optimizer_bytes(config, config.optimizer, count, data),
        objective_rows=(objectives - 1) * shard * FP32,
        reference=count * item,
        critic=_critic(config, shape, data, stage),
        kv_cache=_kv_cache(config, shape, data),
        activations=_activations(config, shape, data, stage),
    )


def _critic(config: Config, shape: ModelShape, data: int, stage: int) -> int:
    """Parameters, gradients and optimizer state of all value models; they take turns with activations."""
    if config.advantages.name != "gae":
        return 0
    objectives = len(config.objectives)
    models, heads = (1, objectives) if config.critic.heads == "shared" else (objectives, 1)
    count = critic_parameters(shape, config.parallel.tensor, config.parallel.pipeline, stage, heads)
    state = _optimizer_bytes(config, config.critic.optimizer, count, data)
    return models * (count * (_item_size(config) + FP32) + state)


def _item_size(config: Config) -> int:
    return 2 if config.model.dtype == "bf16" else FP32


def _optimizer_bytes(config: Config, optimizer: OptimizerConfig, count: int, data: int) -> int:
    """fp32 main parameters (bf16 only) and moments of ``count`` parameters on one of ``data`` ranks."""
    main = 1 if config.model.dtype == "bf16" else 0
    moments = 2 if optimizer.name == "adam" else int(optimizer.momentum > 0)
    return (main + moments) * FP32 * count // (data if optimizer.distributed else 1)


def _kv_cache(config: Config, shape: ModelShape, data: int) -> int:
    rollout = config.rollout
    sequences = min(rollout.batch_size, rollout.prompts_per_step // data * rollout.samples_per_prompt)
    layers = shape.num_layers // config.parallel.pipeline
    width = shape.kv_groups // config.parallel.tensor * shape.head_dim
    return 2 * layers * sequences * _longest(config) * width * _item_size(config)


def _longest(config: Config) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def _activations(config: Config, shape: ModelShape, data: int, stage: int) -> int:
    """The module's formula; see there."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    item, length = _item_size(config), _longest(config)
    residual = shape.hidden // tensor if config.parallel.sequence_parallel else shape.hidden
    attention = 2 * (shape.heads + shape.kv_groups) * shape.head_dim
    layer = (4 * residual + (attention + 4 * shape.ffn) // tensor) * item
    scores = length * shape.heads // tensor * (2 * item + FP32)
    if config.model.recompute == "none":
        layer += scores
    layers = shape.num_layers // pipeline
    tokens = config.micro_batch_size * length
    rollout = config.rollout
    sequences = rollout.prompts_per_step // data * rollout.samples_per_prompt // config.algorithm.minibatches
    in_flight = min(pipeline - stage, sequences // config.micro_batch_size)
    if config.model.recompute == "full":
        held = tokens * (layers * residual * item * in_flight + layer + scores)
    else:
        held = tokens * layers * layer * in_flight
    if stage == pipeline - 1:
        held += tokens * 3 * FP32 * shape.padded_vocab(VOCABULARY_DIVISOR * tensor) // tensor
    return held
