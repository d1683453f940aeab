"""How an assumption that does not hold is told, and what generation assumes; see ``assumptions.py``."""

from __future__ import annotations

import inspect

from megatron.core.distributed import DistributedDataParallel
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from gapo_mega.engine.megatron.generation import layers
from gapo_mega.engine.megatron.runtime import releases

# What the training and the generating forward pass to the model.
_FORWARD = ("input_ids", "position_ids", "attention_mask", "inference_context", "runtime_gather_output")


def wrong(assumption: str, found: object) -> RuntimeError:
    """The error for an assumption that does not hold, with the release."""
    return RuntimeError(
        f"megatron-core {releases.version()}: the engine assumes that {assumption}; found: {found}; "
        "accepted: a release that `gapo-mega info` lists as tested"
    )


def require(holds: bool, assumption: str, found: object) -> None:
    """Raise ``wrong`` unless the assumption holds."""
    if not holds:
        raise wrong(assumption, found)


def generation_finds_cache_and_switches(model: DistributedDataParallel) -> None:
    """What generation reads of Megatron's contexts and modules has its name and form."""
    cache = StaticInferenceContext(1, 1).key_value_memory_dict
    require(cache == {}, "key_value_memory_dict of a new inference context is an empty dictionary", cache)
    accepted = inspect.signature(model.module.forward).parameters
    missing = [name for name in _FORWARD if name not in accepted]
    require(not missing, f"the model's forward takes {', '.join(_FORWARD)}", f"no {', '.join(missing)}")
    layers.obstacle(model.module)  # reads what the decoder reads
    expected = {
        ColumnParallelLinear: "sequence_parallel",
        RowParallelLinear: "sequence_parallel",
        VocabParallelEmbedding: "reduce_scatter_embeddings",
        FusedScaleMaskSoftmax: "window_size",
    }
    for module in model.modules():
        for kind, switch in expected.items():
            require(
                not isinstance(module, kind) or switch in vars(module),
                f"{kind.__name__} has its switch {switch}",
                f"{', '.join(sorted(key for key in vars(module) if not key.startswith('_')))}",
            )
