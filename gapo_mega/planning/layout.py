"""Checks of a configuration against the model's shape and the number of processes.

They run before any model is built, so that a layout that cannot work costs seconds, not an
allocation. The vocabulary is padded to a multiple that tensor parallelism divides, so it fits every
layout.
"""

from __future__ import annotations

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.config import Config, ParallelConfig, strategies
from gapo_mega.config.lora import TARGET_MODULES, LoraConfig
from gapo_mega.models.adapters import linear_of
from gapo_mega.models.shape import ModelShape
from gapo_mega.option_checks import divisors
from gapo_mega.optional import einops, transformer_engine_layers
from gapo_mega.planning.strategy import (
    microbatches,
    minibatch_sequences,
    refusal_of_one_pass,
    refusal_of_shared,
)


def check_model_split(parallel: ParallelConfig, shape: ModelShape, dtype: str, world_size: int) -> int:
    """Number of replicas of a model of ``shape``; a one-line ``ValueError`` where the layout does not fit.

    ``dtype``: fp32 or bf16, in which the model computes.
    """
    _check_model_split(parallel, shape)
    _check_experts(parallel, shape)
    if parallel.context > 1:
        _check_context_of_model(parallel.context, shape, dtype)
    data = data_parallel_size(parallel, world_size)
    _check_sharing(parallel, data)
    return data


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Number of model replicas on ``world_size`` processes. Raises ``ValueError`` if it is not whole."""
    model = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % model:
        context = f" x context {parallel.context}" if parallel.context > 1 else ""
        raise ValueError(
            f"parallel: found tensor {parallel.tensor}{context} x pipeline {parallel.pipeline} = {model} "
            "processes on a world of "
            f"{world_size}, accepted: a product that divides it ({_listed(divisors(world_size))})"
        )
    data, instances = world_size // model, parallel.distributed_optimizer_instances
    if data % instances:
        raise ValueError(
            f"parallel.distributed_optimizer_instances: found {instances}, accepted for {data} data-parallel "
            f"ranks: {_listed(divisors(data))}"
        )
    return data


def check_packages(parallel: ParallelConfig) -> None:
    """Raise ``ValueError`` for a layout that needs a package that is not here. Planning needs none."""
    instances = parallel.distributed_optimizer_instances
    if instances > 1 and not einops().usable:
        raise ValueError(
            f"parallel.distributed_optimizer_instances: found {instances} without the package einops, by "
            "which Megatron arranges their ranks; accepted: 1, or pip install 'gapo-mega[instances]'"
        )


def check_layout(config: Config, shape: ModelShape, world_size: int, estimator: AdvantageEstimator) -> None:
    """Raise a one-line ``ValueError`` for the first thing that does not fit."""
    data_parallel = check_model_split(config.parallel, shape, config.model.dtype, world_size)
    _check_batches(config, data_parallel)
    _check_packing(config)
    _check_context(config)
    packed = config.micro_batch_tokens is not None  # then there are as many as are wanted
    count = (minibatch_sequences if packed else microbatches)(config, data_parallel)
    check_interleaving(config.parallel, shape, count)
    check_gradients(config, shape, data_parallel)
    check_lengths(config, shape)
    _check_samples(config, estimator)


def _check_experts(parallel: ParallelConfig, shape: ModelShape) -> None:
    expert, split = parallel.expert, parallel.experts_split
    if shape.experts is None:
        if expert > 1 or split != parallel.tensor:
            name = "expert" if expert > 1 else "expert_tensor"
            raise ValueError(
                f"parallel.{name}: found {getattr(parallel, name)}, accepted for a model without experts: "
                + ("1" if expert > 1 else "null")
            )
        return
    instances, count = parallel.distributed_optimizer_instances, shape.experts.count
    if instances > 1 and parallel.in_step:
        raise ValueError(
            f"parallel.distributed_optimizer_instances: found {instances} with experts that data ranks share "
            f"(parallel.expert {expert}), accepted: 1 (the two have not been run together)"
        )
    if count % expert:
        raise ValueError(
            f"parallel.expert: found {expert}, accepted for {count} experts: {_listed(divisors(count))}"
        )
    if shape.ffn % split:
        raise ValueError(
            f"parallel.expert_tensor: found {split}, accepted for experts of width {shape.ffn}: "
            f"{_listed(divisors(shape.ffn))}"
        )


def _check_sharing(parallel: ParallelConfig, data: int) -> None:
    """Whether the ranks of a stage hold its experts a whole number of times, by whole replicas or in one."""
    tensor, split = parallel.tensor, parallel.experts_split
    ranks = tensor * data

    def fits(sharing: int) -> bool:
        return ranks % sharing == 0 and (tensor % sharing == 0 or sharing % tensor == 0)

    if fits(parallel.sharing):
        return
    fitting = [number for number in divisors(ranks) if fits(number * split)]
    raise ValueError(
        f"parallel.expert: found {parallel.expert} with parallel.expert_tensor {split}, together "
        f"{parallel.sharing} ranks, on stages of {ranks} (tensor {tensor} x data {data}), accepted: "
        + (_listed(fitting) if fitting else f"1, with an expert_tensor that divides {ranks}")
    )


def _check_model_split(parallel: ParallelConfig, shape: ModelShape) -> None:
    tensor, pipeline = parallel.tensor, parallel.pipeline
    split_by_tensor = {
        "attention heads": shape.heads,
        "key-value groups": shape.kv_groups,
    }
    if shape.experts is None:
        split_by_tensor["feed-forward width"] = shape.ffn
    if any(size % tensor for size in split_by_tensor.values()):
        fitting = [
            d for d in divisors(shape.kv_groups) if not any(size % d for size in split_by_tensor.values())
        ]
        sizes = ", ".join(f"{size} {name}" for name, size in split_by_tensor.items())
        raise ValueError(
            f"parallel.tensor: found {tensor}, accepted for a model with {sizes}: {_listed(fitting)}"
        )
    if shape.experts is not None and tensor > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.sequence_parallel: found false with parallel.tensor {tensor}, accepted for a model "
            "with experts: true (without it every tensor rank would route every token)"
        )
    if shape.num_layers % pipeline:
        raise ValueError(
            f"parallel.pipeline: found {pipeline}, accepted for {shape.num_layers} layers: "
            f"{_listed(divisors(shape.num_layers))}"
        )


def check_interleaving(parallel: ParallelConfig, shape: ModelShape, microbatches: int) -> None:
    """Raise a one-line ``ValueError`` where a trained model's stages cannot be interleaved.

    ``microbatches``: of one optimizer step on a data-parallel rank.
    """
    virtual, pipeline = parallel.virtual_pipeline, parallel.pipeline
    if virtual == 1:
        return
    layers = shape.num_layers // pipeline
    if layers % virtual:
        raise ValueError(
            f"parallel.virtual_pipeline: found {virtual}, accepted for the {layers} layers of a pipeline "
            f"stage: {_listed(divisors(layers))}"
        )
    if microbatches < pipeline:
        raise ValueError(
            f"parallel.virtual_pipeline: found {virtual} with {microbatches} microbatches to an optimizer "
            f"step, accepted: 1, or at least {pipeline} microbatches, one for every stage (a smaller "
            "micro_batch_size makes more)"
        )


def _check_batches(config: Config, data_parallel: int) -> None:
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.prompts_per_step % data_parallel:
        raise ValueError(
            f"rollout.prompts_per_step: found {rollout.prompts_per_step}, accepted for {data_parallel} "
            "data-parallel "
            f"ranks: a multiple of {data_parallel}"
        )
    sequences = config.sequences(data_parallel)
    if sequences % algorithm.minibatches:
        raise ValueError(
            f"algorithm.minibatches: found {algorithm.minibatches}, accepted for the {sequences} sequences "
            "of a "
            f"data-parallel rank: {_listed(divisors(sequences))}"
        )
    minibatch = sequences // algorithm.minibatches
    if config.micro_batch_tokens is None and minibatch % config.micro_batch_size:
        # Pipeline stages exchange tensors of one size, so all microbatches are alike.
        raise ValueError(
            f"micro_batch_size: found {config.micro_batch_size}, accepted for minibatches of {minibatch} "
            "sequences on "
            f"a data-parallel rank: {_listed(divisors(minibatch))}"
        )


def _check_context_of_model(context: int, shape: ModelShape, dtype: str) -> None:
    found = f"parallel.context: found {context} with"
    if shape.experts is not None:
        raise ValueError(f"{found} a model with experts, accepted: 1 (the two have not been tried together)")
    if not transformer_engine_layers():
        return
    layers = "Transformer Engine's layers, whose attention passes keys round a ring"
    if dtype == "fp32":
        raise ValueError(f"{found} dtype fp32 and {layers} in no such type, accepted: 1, or dtype bf16")
    if shape.sliding_window is not None:
        raise ValueError(f"{found} a sliding window and {layers} without one, accepted: 1")


def _check_context(config: Config) -> None:
    backend = config.rollout.backend
    if config.parallel.context > 1 and backend == "megatron" and transformer_engine_layers():
        raise ValueError(
            f"rollout.backend: found megatron with parallel.context {config.parallel.context} and "
            "Transformer Engine's layers, which see a part of every sequence; accepted: vllm, or "
            "parallel.context 1"
        )


def _check_packing(config: Config) -> None:
    tokens = config.micro_batch_tokens
    if tokens is not None and config.parallel.context > 1:
        raise ValueError(
            f"micro_batch_tokens: found {tokens} with parallel.context {config.parallel.context}, accepted: "
            "null (ranks share sequences of rows that hold one each)"
        )
    if tokens is not None and config.model.dtype == "fp32" and transformer_engine_layers():
        raise ValueError(
            f"micro_batch_tokens: found {tokens} with model.dtype fp32 and Transformer Engine's layers, "
            "accepted: null, or model.dtype bf16 (their attention takes packed rows in no other type)"
        )


def check_gradients(config: Config, shape: ModelShape, data_parallel: int) -> None:
    """Raise a one-line ``ValueError`` for settings of ``gradients`` that the model or the batch rules out."""
    check_adapters(config.model.lora, shape)
    _check_routers(config, shape)
    strategies.chosen(config.gradients).check_model(shape.num_layers)
    rows = max(len(config.rows), len(config.audited_rows))
    reason = refusal_of_shared(config, microbatches(config, data_parallel), rows)
    if config.gradients.forward == "shared" and reason is not None:
        raise ValueError(f"gradients.forward: found shared with {reason}, accepted: auto, separate")
    reason = refusal_of_one_pass()
    if config.gradients.forward == "one_pass" and reason is not None:
        raise ValueError(f"gradients.forward: found one_pass with {reason}, accepted: auto, shared, separate")


def _check_routers(config: Config, shape: ModelShape) -> None:
    """Losses of routers need routers that are trained."""
    for name in ("router_aux_loss", "router_z_loss"):
        factor = getattr(config.model, name)
        if factor > 0 and shape.experts is None:
            raise ValueError(f"model.{name}: found {factor:g} with a model without experts, accepted: 0")
        if factor > 0 and config.model.lora is not None:
            raise ValueError(
                f"model.{name}: found {factor:g} with model.lora, accepted: 0 (routers are frozen)"
            )


def check_adapters(lora: LoraConfig | None, shape: ModelShape) -> None:
    """Raise a one-line ``ValueError`` for adapters on layers that take none."""
    if lora is None:
        return
    if transformer_engine_layers():
        raise ValueError(
            "model.lora: found adapters with Transformer Engine's layers, accepted: null (these layers norm "
            "and multiply in one, and show nobody what they multiply)"
        )
    found = [name for name in lora.targets if linear_of(name).folder == "mlp"]
    if found and shape.experts is not None:
        others = [name for name in TARGET_MODULES if linear_of(name).folder != "mlp"]
        raise ValueError(
            f"model.lora.target_modules: found {', '.join(found)} with a model with experts, accepted: "
            f"{', '.join(others)} (experts have no adapters)"
        )


def check_lengths(config: Config, shape: ModelShape) -> None:
    """Raise a one-line ``ValueError`` for sequences that are longer than the model's."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    if prompt + response > shape.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_new_tokens: found {prompt} + {response} = "
            f"{prompt + response}, "
            f"accepted: at most the model's {shape.max_positions} positions"
        )
    if shape.sliding_window is not None and prompt + response > shape.sliding_window:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_new_tokens: found {prompt} + {response} = "
            f"{prompt + response}, "
            f"accepted: at most {shape.sliding_window}, the model's sliding attention window"
        )


def _check_samples(config: Config, estimator: AdvantageEstimator) -> None:
    samples = config.rollout.samples_per_prompt
    if samples < estimator.least_samples:
        raise ValueError(
            f"rollout.samples_per_prompt: found {samples}, accepted with advantages.name "
            f"{config.advantages.name}: {estimator.least_samples} or more, because "
            f"{estimator.least_samples_because}"
        )
    if config.advantages.filter_flat and estimator.least_samples < 2:
        raise ValueError(
            f"advantages.filter_flat: found true with advantages.name {config.advantages.name}, accepted: "
            "false (it does not compare the samples of a prompt, so equal scores teach it something)"
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
