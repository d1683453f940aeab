"""Every assumption about Megatron's objects, broken on a real model and its optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from torch import nn

from gapo_mega.engine.megatron.model import assumptions
from gapo_mega.engine.megatron.model.modules import RMSNorm
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from tests.helpers.ranks import worlds
from tests.helpers.ranks.check_checkpoint import Run

FORMS: dict[str, dict[str, Any]] = {
    "fp32-distributed": {},
    "fp32": {"optimizer": {"distributed": False}},
    "bf16-distributed": {"dtype": "bf16"},
    "bf16": {"dtype": "bf16", "optimizer": {"distributed": False}},
    # Several buckets: tied embeddings have one of their own.
    "tied-overlap": {"tied": True, "optimizer": {"overlap_grad_reduce": True}},
    "gather": {"optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "sgd": {"optimizer": {"name": "sgd", "distributed": False}},
}


@pytest.fixture(scope="module", autouse=True)
def single_process() -> Iterator[None]:
    yield
    worlds.leave()


def trained(**arguments: Any) -> Trainable:
    """A policy with its optimizer, freshly made: the tests break it."""
    return Run(arguments, worlds.enter(1, 1), seed=1).trainables["policy"]


def check(made: Trainable) -> None:
    with megatron_device():
        assumptions.check([made.model], made.optimizer)


def first(made: Trainable, kind: type[nn.Module]) -> nn.Module:
    return next(module for module in made.model.modules() if isinstance(module, kind))


@pytest.mark.parametrize("form", FORMS)
def test_they_hold(form: str) -> None:
    made = trained(**FORMS[form])
    values = [parameter.detach().clone() for parameter in made.model.parameters()]
    check(made)
    check(made)  # and checking changes nothing that it checks
    assert all(not buffer.grad_data.any() for buffer in made.model.buffers)
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), values, strict=True))


# Each breaks one thing of a fp32 model with the distributed optimizer, as another release might have it.
def shift_a_parameter(made: Trainable) -> None:
    places = made.model.buffers[0].param_index_map
    parameter, (start, end, bucket) = max(places.items(), key=lambda item: item[1][0])
    places[parameter] = start - 1, end - 1, bucket


def lengthen_a_parameter(made: Trainable) -> None:
    places = made.model.buffers[0].param_index_map
    parameter, (start, end, bucket) = next(iter(places.items()))
    places[parameter] = start, end + 1, bucket


def lay_two_parameters_together(made: Trainable) -> None:
    places = made.model.buffers[0].param_index_map
    (_, (start, _, bucket)), *others = places.items()
    places[others[-1][0]] = start, start + others[-1][0].numel(), bucket


def lose_a_parameter(made: Trainable) -> None:
    places = made.model.buffers[0].param_index_map
    places.pop(next(iter(places)))


def name_another_bucket(made: Trainable) -> None:
    places = made.model.buffers[0].param_index_map
    parameter, (start, end, _) = next(iter(places.items()))
    places[parameter] = start, end, len(made.model.buffers[0].buckets)


def add_to_the_entries(made: Trainable) -> None:
    places = made.model.buffers[0].param_index_map
    for parameter, entry in list(places.items()):
        places[parameter] = (*entry, 0)


def copy_the_bucket(made: Trainable) -> None:
    bucket = made.model.buffers[0].buckets[0]
    bucket.grad_data = bucket.grad_data.clone()


def move_the_bucket(made: Trainable) -> None:
    made.model.buffers[0].buckets[0].offset += 64


def rename_the_offset(made: Trainable) -> None:
    del made.model.buffers[0].buckets[0].offset


def keep_main_gradients_elsewhere(made: Trainable) -> None:
    parameter = next(made.model.parameters())
    parameter.main_grad = parameter.main_grad.clone()  # type: ignore[attr-defined]


def keep_gradients_in_bf16(made: Trainable) -> None:
    buffer = made.model.buffers[0]
    buffer.grad_data = buffer.grad_data.bfloat16()


def begin_with_gradients_added(made: Trainable) -> None:
    next(made.model.parameters()).grad_added_to_main_grad = True  # type: ignore[attr-defined]


def have_experts(made: Trainable) -> None:
    made.model.expert_parallel_buffers = [made.model.buffers[0]]


def forget_a_gradient(made: Trainable) -> None:
    made.model.params_with_grad.pop()


def forget_a_bucket_group(made: Trainable) -> None:
    made.model.bucket_groups.pop()


def copy_the_configuration(made: Trainable) -> None:
    for group in made.model.bucket_groups:
        group.ddp_config = copy.copy(group.ddp_config)


def take_the_mean(made: Trainable) -> None:
    made.model.bucket_groups[0].buckets[0].gradient_scaling_factor = 0.5


def reduce_over_nobody(made: Trainable) -> None:
    made.model.bucket_groups[0].intra_distributed_optimizer_instance_group = None


def chain_two_optimizers(made: Trainable) -> None:
    made.optimizer.chained_optimizers.append(made.optimizer.chained_optimizers[0])


def have_another_optimizer(made: Trainable) -> None:
    inner = made.optimizer.chained_optimizers[0]
    made.optimizer.chained_optimizers[0] = inner.optimizer


def have_no_group_for_norms(made: Trainable) -> None:
    made.optimizer.chained_optimizers[0].grad_stats_parallel_group = None


def have_two_rates(made: Trainable) -> None:
    made.optimizer.param_groups[-1]["lr"] *= 2


def step_another_part(made: Trainable) -> None:
    inner = made.optimizer.chained_optimizers[0]
    parameter = next(iter(inner.model_param_group_index_map))
    inner._get_model_param_range_map(parameter)["param"].end -= 1


def forget_to_step(made: Trainable) -> None:
    places = made.optimizer.chained_optimizers[0].model_param_group_index_map
    places.pop(next(iter(places)))


def step_copies(made: Trainable) -> None:
    group = made.optimizer.chained_optimizers[0].optimizer.param_groups[0]
    group["params"][0] = nn.Parameter(group["params"][0].detach().clone())


def step_other_values(made: Trainable) -> None:
    group = made.optimizer.chained_optimizers[0].optimizer.param_groups[0]
    group["params"][0] = nn.Parameter(group["params"][0].detach() + 1.0)


def split_a_norm(made: Trainable) -> None:
    first(made, RMSNorm).weight.tensor_model_parallel = True  # type: ignore[union-attr]


def replicate_a_layer(made: Trainable) -> None:
    first(made, ColumnParallelLinear).weight.tensor_model_parallel = False  # type: ignore[union-attr]


def share_the_embedding(made: Trainable) -> None:
    first(made, VocabParallelEmbedding).weight.shared = True  # type: ignore[union-attr]


def share_a_copy(made: Trainable) -> None:
    made.optimizer.chained_optimizers[0].optimizer.param_groups[0]["params"][0].shared = True


def halve_the_reduction(made: Trainable) -> None:
    reduce = made.model.config.finalize_model_grads_func

    def halved(models: list[Any], *rest: Any, **options: Any) -> None:
        reduce(models, *rest, **options)
        models[0].scale_gradients(0.5)

    made.model.config.finalize_model_grads_func = halved


def rename_the_norm(made: Trainable) -> None:
    made.optimizer.get_grad_norm = None


def rename_an_argument(made: Trainable) -> None:
    def forward(
        input_ids: Any, position_ids: Any, attention_mask: Any, runtime_gather_output: Any
    ) -> None: ...

    made.model.module.forward = forward


def leave_the_window(made: Trainable) -> None:
    del first(made, FusedScaleMaskSoftmax).window_size


def rename_the_switch(made: Trainable) -> None:
    del first(made, VocabParallelEmbedding).reduce_scatter_embeddings


BROKEN: dict[Callable[[Trainable], None], str] = {
    shift_a_parameter: "parameter.main_grad is the part",
    lengthen_a_parameter: "param_index_map has each parameter's own",
    lay_two_parameters_together: "param_index_map has each parameter's own",
    lose_a_parameter: "lies in exactly one of the model's buffers",
    name_another_bucket: "has its name and form; found: list index out of range",
    add_to_the_entries: "has its name and form; found: too many values to unpack",
    copy_the_bucket: "bucket.grad_data is the part of buffer.grad_data",
    move_the_bucket: "bucket.grad_data is the part of buffer.grad_data",
    rename_the_offset: "has its name and form; found: .* no attribute 'offset'",
    keep_main_gradients_elsewhere: "parameter.main_grad is the part",
    keep_gradients_in_bf16: "one flat fp32 tensor; found: torch.bfloat16",
    begin_with_gradients_added: "grad_added_to_main_grad begins as False",
    have_experts: "no parameter is an expert's",
    forget_a_gradient: "params_with_grad are the trainable parameters",
    forget_a_bucket_group: "every bucket is in one of bucket_groups",
    copy_the_configuration: "chunks and their bucket groups read one ddp_config",
    take_the_mean: "the reduction sums gradients and does not scale them; found: gradient_scaling_factor 0.5",
    reduce_over_nobody: "gradients are reduced over the data-parallel group; found: None",
    chain_two_optimizers: "one optimizer has all parameters; found: 2 chained_optimizers",
    have_another_optimizer: "one of Megatron's three .* found: Adam",
    have_no_group_for_norms: r"get_grad_stats_parallel_group\(\) has the ranks .* \[0\]; found: None",
    have_two_rates: "all param_groups have one learning rate",
    step_another_part: "a rank steps the part of each parameter",
    forget_to_step: "a rank steps the part of each parameter",
    step_copies: "the optimizer steps fp32 parameters themselves",
    step_other_values: "the optimizer's parameters hold the model's values",
    split_a_norm: "tensor_model_parallel marks .* found: True for .*layernorm",
    replicate_a_layer: "tensor_model_parallel marks .* found: False for .*linear_qkv",
    share_the_embedding: "shared marks the last stage's copy .* found: True for .*word_embeddings",
    share_a_copy: "the optimizer's copies carry the parameters' marks",
    halve_the_reduction: "leaves the sum over 1 ranks .* found: 0.5 to 0.5",
    rename_the_norm: "the optimizer has .*; found: no get_grad_norm",
    rename_an_argument: "the model's forward takes .*; found: no inference_context",
    leave_the_window: "FusedScaleMaskSoftmax has its switch window_size",
    rename_the_switch: "VocabParallelEmbedding has its switch reduce_scatter_embeddings",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_release_that_breaks_one_is_told_by_it(breaks: Callable[[Trainable], None]) -> None:
    made = trained()
    breaks(made)
    with pytest.raises(RuntimeError, match=BROKEN[breaks]) as caught:
        check(made)
    message = str(caught.value)
    assert message.startswith(f"megatron-core {version('megatron-core')}: ") and "\n" not in message


def test_stale_copies_of_bf16_parameters_are_told() -> None:
    """What happens where weights are loaded after the optimizer was made."""
    made = trained(dtype="bf16")
    next(made.model.parameters()).data.view(-1)[-1] += 1.0
    with pytest.raises(RuntimeError, match="the optimizer's parameters hold the model's values"):
        check(made)
