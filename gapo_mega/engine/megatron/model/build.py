"""Builds GPTModels for policy, reference and critic, and wraps them with Megatron's optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor
from torch.nn.functional import silu

from gapo_mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from gapo_mega.engine.megatron.model.modules import RMSNorm, ValueModel
from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.models.shape import ModelShape
from gapo_mega.optional import transformer_engine_layers

VOCABULARY_DIVISOR = 128  # Megatron's usual padding, times the tensor-parallel size


@dataclass(frozen=True)
class Trainable:
    """A model in DistributedDataParallel with its optimizer and learning-rate schedule."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def zero_grad(self) -> None:
        """Zero the gradient buffer and clear ``param.grad``.

        Megatron's fp32 optimizer leaves ``param.grad`` an alias of the buffer. The next backward would
        accumulate into it, and its hook would add it to the buffer again: one microbatch would count twice.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def grad_norm(self) -> float:
        """Megatron's norm of the gradient in the buffer; ``step`` may follow."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def resident(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimizer state on this rank, by the tensors."""
        (inner,) = self.optimizer.chained_optimizers
        parameters = list(self.model.parameters())
        own = {p.data_ptr() for p in parameters}
        mains = [p for group in inner.optimizer.param_groups for p in group["params"]]
        state = [t for held in inner.optimizer.state.values() for t in held.values() if torch.is_tensor(t)]
        # Without bf16 the optimizer steps the parameters themselves, or views of them.
        copies = [p for p in mains if self.model.config.bf16 and p.data_ptr() not in own]
        return {
            "parameters": _bytes(parameters),
            "gradients": _bytes([buffer.grad_data for buffer in self.model.buffers]),
            "optimizer": _bytes(state) + _bytes(copies),
        }

    def step(self) -> float:
        """One optimizer and scheduler step on a finite gradient. Returns the norm before clipping."""
        updated, norm, _ = self.optimizer.step()
        assert updated, "the gradient was found finite"
        self.scheduler.step(1)
        return float(norm)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def reduce_gradients(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **options: Any
) -> None:
    """Megatron's gradient reduction over data ranks, tensor ranks and stages, without its division by tokens.

    Every loss is already divided by the tokens of its minibatch over all ranks and microbatches, so this
    ignores the schedule's count.
    """
    finalize_model_grads(model, None, **options)


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """The vocabulary size that a model over ``tensor`` tensor-parallel ranks allocates."""
    unit = VOCABULARY_DIVISOR * tensor
    return -(-vocabulary // unit) * unit


def transformer_config(shape: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's configuration of one model: no dropout, no fusions that need Apex or CUDA."""
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    recompute: dict[str, Any] = {}
    if model.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif model.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
    window = None if shape.sliding_window is None else (shape.sliding_window - 1, 0)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,  # also makes Megatron sum these norms' gradients over tensor ranks
        window_size=window,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=model.dtype == "bf16",
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        batch_p2p_sync=False,
        calculate_per_token_loss=True,  # gradients are sums, over microbatches and over data ranks
        **recompute,
    )


def layer_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers if it is really installed and there is a GPU, else Megatron's own."""
    if transformer_engine_layers():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )


def build_gpt(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, value_heads: int | None = None
) -> GPTModel:
    """Build this rank's pipeline stage of a model with random weights, on this rank's device.

    ``value_heads``: the number of values per position; None for a language model.
    """
    config = transformer_config(shape, model, parallel)
    kwargs: dict[str, Any] = {
        "config": config,
        "transformer_layer_spec": layer_spec(config),
        "vocab_size": padded_vocabulary(shape.vocab, parallel.tensor),
        "max_sequence_length": shape.max_positions,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "position_embedding_type": "rope",
        "rotary_base": shape.rope_theta,
    }
    if shape.rope_scaling_factor is not None:
        kwargs |= {"rope_scaling": True, "rope_scaling_factor": shape.rope_scaling_factor}
    if value_heads is None:
        built = GPTModel(share_embeddings_and_output_weights=shape.tied, **kwargs)
    else:
        built = ValueModel(heads=value_heads, **kwargs)
    return built.to(device())


def make_trainable(model: GPTModel, optimizer: OptimizerConfig, total_steps: int) -> Trainable:
    """Wrap ``model`` for training. Load its weights *before*: with bf16 the optimizer copies them to fp32."""
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=optimizer.distributed,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,  # the Gram matrix shows a NaN and which objective has it
    )
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    wrapped.broadcast_params()
    model.config.finalize_model_grads_func = reduce_gradients
    if optimizer.overlap_grad_reduce:
        model.config.no_sync_func = wrapped.no_sync
    bf16 = model.config.bf16
    megatron_optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer=optimizer.name,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            sgd_momentum=optimizer.momentum,
            clip_grad=optimizer.clip_grad,
            use_distributed_optimizer=optimizer.distributed,
            bf16=bf16,
            params_dtype=model.config.params_dtype,
        ),
        [wrapped],
    )
    return Trainable(wrapped, megatron_optimizer, _scheduler(megatron_optimizer, optimizer, total_steps))


def _scheduler(
    megatron_optimizer: MegatronOptimizer, optimizer: OptimizerConfig, total_steps: int
) -> OptimizerParamScheduler:
    # Leaves at least one step of decay, because Megatron refuses none.
    warmup = min(int(optimizer.warmup_fraction * total_steps), total_steps - 1)
    scheduler = OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=optimizer.lr / (warmup + 1),
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style=optimizer.schedule,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    return scheduler
