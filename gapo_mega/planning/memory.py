"""Predicts the memory of a rank before anything is allocated; see docs/memory.md for measurements.

Parameters, gradients, optimizer state and rows follow from the shapes exactly, but for the padding of
Megatron's buckets (each parameter begins at a multiple of 64 elements, each bucket ends at one of 128 per
data rank: 0.1 % of the smallest models). Rows of objectives: what the gradient strategy declares
(``config/strategies/``), and the running means of ``aggregation.average``. ``activations.py`` says what a
training pass holds.

Not counted: a GPU's context, in which the driver keeps the stacks of our kernels (docs/gpu.md), what its
allocator keeps in reserve, buffers of the communication library (gloo copies the gradient buffer where the
distributed optimizer's reduction overlaps the backward), temporaries of the optimizer's step, and what scopes
last_layer and last_block need to form the output layer's rows. Beside a rank's peak, not in it: the copy in
host memory of a checkpoint that is written in the background.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from gapo_mega.config import Config, OptimizerConfig, ParallelConfig
from gapo_mega.config.lora import LoraConfig
from gapo_mega.config.strategies import RankSizes
from gapo_mega.config.strategies.scoped import has_output_layer
from gapo_mega.models.adapters import layer_parameters
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.activations import FP32, VOCABULARY_DIVISOR, activation_peak
from gapo_mega.planning.chunks import logits_chunk
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.planning.strategy import sequences_answered

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class StagePlan:
    """Bytes of one rank of a pipeline stage: the fullest one, if its tensor and data ranks differ."""

    stage: int
    policy_parameters: int  # elements
    parameters: int
    gradients: int
    optimizer: int
    objective_rows: int
    reference: int  # 0 if it is in host memory between uses (so are score models), or is the policy
    score_models: int
    critic: int
    visiting: int  # the largest model that is on the device only while it is used
    kv_cache: int
    activations: int
    held_checkpoint: int = 0  # in host memory, while a checkpoint is written in the background

    @property
    def resident(self) -> int:
        """What is held all the time."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.objective_rows
            + self.reference
            + self.score_models
            + self.critic
        )

    @property
    def peak(self) -> int:
        """Generation, scoring and training do not overlap, so the largest of them counts."""
        return self.resident + max(self.kv_cache, self.visiting, self.activations)


@dataclass(frozen=True)
class MemoryPlan:
    """The prediction of every pipeline stage."""

    stages: list[StagePlan]

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(stage.peak for stage in self.stages)

    @property
    def unit(self) -> tuple[str, int]:
        """The unit to show this in and its bytes: GiB, or MiB for small models."""
        return ("GiB", GIB) if self.peak >= GIB else ("MiB", MIB)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes by kind of every stage, and of the fullest rank."""
        stages = [asdict(s) | {"resident": s.resident, "peak": s.peak} for s in self.stages]
        return {"stages": stages, "peak": self.peak}

    def table(self) -> str:
        """Rows of kinds, columns of pipeline stages, in GiB (MiB for small models)."""
        kinds = {
            "parameters": [s.parameters for s in self.stages],
            "gradients (fp32)": [s.gradients for s in self.stages],
            "optimizer state": [s.optimizer for s in self.stages],
            "rows of objectives": [s.objective_rows for s in self.stages],
            "reference": [s.reference for s in self.stages],
            "score models": [s.score_models for s in self.stages],
            "critic": [s.critic for s in self.stages],
            "offloaded model, in use": [s.visiting for s in self.stages],
            "KV cache (generation)": [s.kv_cache for s in self.stages],
            "activations (training)": [s.activations for s in self.stages],
            "peak": [s.peak for s in self.stages],
        }
        if any(s.held_checkpoint for s in self.stages):
            kinds["checkpoint (host memory)"] = [s.held_checkpoint for s in self.stages]
        unit, size = self.unit
        lines = [f"{f'{unit} per rank':<26}" + "".join(f"{f'stage {s.stage}':>12}" for s in self.stages)]
        lines += [f"{kind:<26}" + "".join(f"{n / size:>12.2f}" for n in row) for kind, row in kinds.items()]
        return "\n".join(lines)


def predict(resolved: ResolvedRun) -> MemoryPlan:
    """The memory of every rank of the run."""
    return MemoryPlan([_stage(resolved, stage) for stage in range(resolved.config.parallel.pipeline)])


def rank_sizes(
    parallel: ParallelConfig,
    shape: ModelShape,
    shard: int,
    whole: int,
    stage: int,
    lora: LoraConfig | None = None,
) -> RankSizes:
    """What the rows of a rank of ``stage`` depend on.

    ``shard``: elements of the gradient that it owns; ``whole``: of its gradient before the reduction;
    ``lora``: the adapters that are trained; None: the whole model is.
    """
    chunks = range(parallel.virtual_pipeline)
    layers = shape.num_layers // parallel.pipeline // len(chunks)
    starts = [(chunk * parallel.pipeline + stage) * layers for chunk in chunks]
    is_last = stage == parallel.pipeline - 1
    return RankSizes(
        shard=shard,
        whole=whole,
        layer=_layer_parameters(shape, parallel.tensor, parallel.sharing)
        if lora is None
        else layer_parameters(shape, lora, parallel.tensor),
        layers=[layer for start in starts for layer in range(start, start + layers)],
        num_layers=shape.num_layers,
        output_layer=_embedding_parameters(shape, parallel.tensor) if is_last else 0,
    )


def average_bytes(resolved: ResolvedRun, sizes: RankSizes, dtype: str | None = None) -> int:
    """Bytes of the gradients' running means on a rank (``aggregation.average``); ``dtype``: None: theirs."""
    config = resolved.config
    if not config.aggregation.average:
        return 0
    return resolved.strategy.average_bytes(len(config.rows), sizes, dtype or config.aggregation.average_dtype)


def stage_parameters(
    shape: ModelShape, tensor: int, pipeline: int, stage: int, sharing: int | None = None
) -> int:
    """Parameters of the language model on one rank of a stage, the padded vocabulary included.

    ``sharing``: ranks that together hold experts once; None: the tensor ranks.
    """
    total = _backbone_parameters(shape, tensor, pipeline, stage, sharing)
    holds_embedding_already = shape.tied and pipeline == 1
    if stage == pipeline - 1 and not holds_embedding_already:
        # Untied: the output layer. Tied over several stages: the last stage's copy of the embedding.
        total += _embedding_parameters(shape, tensor)
    return total


def critic_parameters(
    shape: ModelShape, tensor: int, pipeline: int, stage: int, heads: int, sharing: int | None = None
) -> int:
    """Parameters of a value model: its linear head with bias is not split over tensor ranks."""
    head = heads * (shape.hidden + 1) if stage == pipeline - 1 else 0
    return _backbone_parameters(shape, tensor, pipeline, stage, sharing) + head


def _backbone_parameters(
    shape: ModelShape, tensor: int, pipeline: int, stage: int, sharing: int | None
) -> int:
    total = _layer_parameters(shape, tensor, sharing) * (shape.num_layers // pipeline)
    if stage == 0:
        total += _embedding_parameters(shape, tensor)
    if stage == pipeline - 1:
        total += shape.hidden  # final norm
    return total


def _layer_parameters(shape: ModelShape, tensor: int, sharing: int | None) -> int:
    query, key = shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
    split = shape.hidden * (query + 2 * key) + query * shape.hidden
    if shape.qkv_bias:
        split += query + 2 * key
    mlps = _mlp_parameters(shape, tensor if shape.experts is None else sharing or tensor)
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    return split // tensor + mlps + norms + shape.router  # norms and routers are held by every tensor rank


def _mlp_parameters(shape: ModelShape, sharing: int) -> int:
    return 3 * shape.hidden * shape.ffn * shape.mlps // sharing


def _stepped(resolved: ResolvedRun, shape: ModelShape, count: int) -> int:
    """Of a stage's ``count`` trained parameters on a rank, those whose optimizer state it has."""
    parallel, owners = resolved.config.parallel, _owners(resolved)
    if shape.experts is None:
        return count // owners
    # Experts that ranks share are held by another number of ranks than all else.
    experts = _mlp_parameters(shape, parallel.sharing) * (shape.num_layers // parallel.pipeline)
    return (count - experts) // owners + experts // (parallel.tensor * owners // parallel.sharing)


def _owners(resolved: ResolvedRun) -> int:
    """Ranks that have the optimizer's state of one part of the model together."""
    parallel = resolved.config.parallel
    return resolved.data * parallel.context // parallel.distributed_optimizer_instances


def _embedding_parameters(shape: ModelShape, tensor: int) -> int:
    return shape.padded_vocab(VOCABULARY_DIVISOR * tensor) // tensor * shape.hidden


def _stage(resolved: ResolvedRun, stage: int) -> StagePlan:
    config, shape, data = resolved.config, resolved.shape, resolved.data
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    item, sharing = _item_size(config), config.parallel.sharing
    count = stage_parameters(shape, tensor, pipeline, stage, sharing)
    lora, trained = config.model.lora, count
    if lora is not None:
        trained = layer_parameters(shape, lora, tensor) * (shape.num_layers // pipeline)
        count += trained
    # Of every update, and of those that are audited.
    measured = [len(rows) for rows in (config.rows, config.audited_rows) if rows]
    # A graph that serves only one backward is freed within it.
    kept = any(
        resolved.forward_of(rows) == "shared" and resolved.strategy_of(rows).reuses_graph(rows)
        for rows in measured
    )
    # A shared forward keeps all logits, and so do rows of the output layer.
    whole = any(resolved.forward_of(rows) == "shared" for rows in measured)
    scope = config.gradients.scope
    chunk = 0 if whole or (scope != "full" and has_output_layer(scope)) else logits_chunk(config, shape)
    stepped = _stepped(resolved, shape, trained) if lora is None else trained // _owners(resolved)
    shard = stepped if config.optimizer.distributed else trained
    sizes = rank_sizes(config.parallel, shape, shard, trained, stage, lora)
    offloaded = config.model.offload_reference
    scoring = [
        (
            model.request.offload,
            critic_parameters(model.shape, tensor, pipeline, stage, 1, sharing)
            * (2 if model.request.dtype == "bf16" else FP32),
        )
        for model in resolved.score_models
    ]
    visitors = [size for away, size in scoring if away] + ([count * item] if offloaded else [])
    return StagePlan(
        stage=stage,
        policy_parameters=count,
        parameters=count * item,
        gradients=trained * FP32,
        optimizer=_optimizer_bytes(config, config.optimizer, shard),
        objective_rows=sum(resolved.strategy_of(rows).row_bytes(rows, sizes) for rows in measured)
        + average_bytes(resolved, sizes)
        # The gradient of the routers' losses, of every strategy that updates.
        + len(measured) * config.model.router_losses * shard * FP32,
        reference=0 if offloaded or lora is not None else count * item,
        score_models=sum(size for away, size in scoring if not away),
        critic=_critic(resolved, stage),
        visiting=max(visitors, default=0),
        kv_cache=_kv_cache(config, shape, data),
        activations=activation_peak(config, shape, stage, resolved.microbatches, kept, chunk),
        held_checkpoint=_held_checkpoint(resolved, stage, count, replace(sizes, shard=trained)),
    )


def _held_checkpoint(resolved: ResolvedRun, stage: int, count: int, whole: RankSizes) -> int:
    """What a save in the background copies: parameters, and the state of all of them in fp32.

    On the first data rank, which writes for all; the others write nothing. ``count``: parameters of the rank;
    ``whole``: its sizes, with all of its gradient as the shard.
    """
    config, shape = resolved.config, resolved.shape
    if not config.checkpoint.asynchronous:
        return 0
    trained = whole.shard
    if shape.tied and 0 < stage == config.parallel.pipeline - 1:
        copied = _embedding_parameters(shape, config.parallel.tensor)  # the first stage writes it
        count, trained = count - copied, trained - (0 if config.model.lora else copied)
    means = average_bytes(resolved, replace(whole, shard=trained), "fp32")
    state = _optimizer_bytes(config, config.optimizer, trained)
    return count * _item_size(config) + state + means + _held_critics(resolved, stage)


def _held_critics(resolved: ResolvedRun, stage: int) -> int:
    if resolved.critic is None:
        return 0
    config = resolved.config
    count = _critic_parameters(resolved, stage)
    state = _optimizer_bytes(config, config.critic.optimizer, count)
    return resolved.value_models * (count * _item_size(config) + state)


def _critic(resolved: ResolvedRun, stage: int) -> int:
    """Parameters, gradients and optimizer state of all value models; they train in turn with the policy."""
    if resolved.critic is None:
        return 0
    config = resolved.config
    count = _critic_parameters(resolved, stage)
    stepped = (
        _stepped(resolved, resolved.critic.shape, count) if config.critic.optimizer.distributed else count
    )
    state = _optimizer_bytes(config, config.critic.optimizer, stepped)
    return resolved.value_models * (count * (_item_size(config) + FP32) + state)


def _critic_parameters(resolved: ResolvedRun, stage: int) -> int:
    """Of one value model, on a rank."""
    assert resolved.critic is not None
    parallel = resolved.config.parallel
    return critic_parameters(
        resolved.critic.shape,
        parallel.tensor,
        parallel.pipeline,
        stage,
        resolved.value_heads,
        parallel.sharing,
    )


def _item_size(config: Config) -> int:
    return 2 if config.model.dtype == "bf16" else FP32


def _optimizer_bytes(config: Config, optimizer: OptimizerConfig, count: int) -> int:
    """fp32 main parameters (bf16 only) and moments of the ``count`` parameters that a rank steps."""
    main = 1 if config.model.dtype == "bf16" else 0
    moments = 2 if optimizer.name == "adam" else int(optimizer.momentum > 0)
    return (main + moments) * FP32 * count


def _kv_cache(config: Config, shape: ModelShape, data: int) -> int:
    sequences = min(config.rollout.batch_size, sequences_answered(config, data))
    layers = shape.num_layers // config.parallel.pipeline
    width = shape.kv_groups // config.parallel.tensor * shape.head_dim
    return 2 * layers * sequences * config.longest * width * _item_size(config)
