"""The settings that are combined, and which combinations the project itself accepts."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from gapo_mega.config import (
    Config,
    DataConfig,
    GradientConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    RolloutConfig,
)
from gapo_mega.config.strategies import stores
from gapo_mega.models.shape import ModelShape
from tests.helpers.peft_models import SETTINGS
from tests.helpers.resolved import check

OBJECTIVES = 2
ROWS = 8  # sequences of a step over all data ranks
SEVERAL = 2  # sequences of a microbatch where there are several
PACKED = 48  # tokens of a row where sequences, of up to 21, are packed

# Adam divides by sqrt(v) + eps: near the size of the gradients' elements, it stays a smooth function of them.
BETA1, BETA2, EPS = 0.9, 0.9, 1e-4
# Below the norm of every combined gradient here: Gram matrices must be those before clipping.
CLIP = 0.5
RATE = 5e-5
# A penalty that shows, and so many tokens that the reference's kept ones look like a cut of them.
TOP_K, PENALTY = 100, 1.3


class Layout(NamedTuple):
    """Ranks, how many of them tensor and pipeline parallelism take, and the chunks of a pipeline stage.

    ``expert``: so many neighbouring ranks of a stage share whole experts; 1: every tensor rank has its part
    of all. ``context``: ranks that share every sequence. ``instances``: of the distributed optimizer.
    """

    ranks: int
    tensor: int
    pipeline: int
    virtual: int = 1
    expert: int = 1
    context: int = 1
    instances: int = 1

    @property
    def data(self) -> int:
        """Model replicas."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def parallel(self) -> dict[str, int]:
        """As in the section ``parallel``."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "virtual_pipeline": self.virtual}
        sizes |= {"context": self.context, "distributed_optimizer_instances": self.instances}
        return sizes | ({"expert": self.expert, "expert_tensor": 1} if self.expert > 1 else {})


LAYOUTS = {
    "single": Layout(1, 1, 1),
    "TP2": Layout(2, 2, 1),
    "PP2": Layout(2, 1, 2),
    "DP2": Layout(2, 1, 1),
    "PP2-interleaved": Layout(2, 1, 2, 2),
    "TP2xEP2": Layout(2, 2, 1, expert=2),
    "DP2xEP2": Layout(2, 1, 1, expert=2),  # over the data ranks
    "CP2": Layout(2, 1, 1, context=2),
    "DP2-instances": Layout(2, 1, 1, instances=2),
    "TP2xPP2": Layout(4, 2, 2),
    "TP2xDP2": Layout(4, 2, 1),
    "PP2xDP2": Layout(4, 1, 2),
    "TP2xPP2-interleaved": Layout(4, 2, 2, 2),
    "PP2xDP2-interleaved": Layout(4, 1, 2, 2),
    "TP2xDP2xEP4": Layout(4, 2, 1, expert=4),
    "PP2xDP2xEP2": Layout(4, 1, 2, expert=2),
    "TP2xCP2": Layout(4, 2, 1, context=2),
    "PP2xCP2-interleaved": Layout(4, 1, 2, 2, context=2),
    "DP4-instances": Layout(4, 1, 1, instances=2),
}
# Layers 1 and 2 lie on both sides of a pipeline's cut; 0 and 2 have layers out of scope between and behind.
SCOPES: dict[str, str | list[list[int]]] = {
    "full": "full",
    "last_layer": "last_layer",
    "last_block": "last_block",
    "layers_1-2": [[1, 3]],
    "layers_0,2": [[0, 1], [2, 3]],
}
ON_OFF = ("false", "true")


@dataclass(frozen=True)
class Setting:
    """One combination: a value of every axis, as written on the command line."""

    model: str
    layout: str
    sequence_parallel: str
    distributed: str
    overlap: str
    recompute: str
    tied: str
    microbatches: str
    dtype: str
    store: str
    store_dtype: str
    forward: str
    scope: str
    metric: str
    temperature: str
    sampling: str

    @property
    def values(self) -> dict[str, str]:
        """Value by axis."""
        return asdict(self)


AXES: dict[str, tuple[str, ...]] = {
    "model": ("dense", "experts", "adapters"),
    "layout": tuple(LAYOUTS),
    "sequence_parallel": ON_OFF,
    "distributed": ON_OFF,
    "overlap": ("none", "reduce", "reduce_and_gather"),  # of communication with passes
    "recompute": ("none", "selective", "full"),
    "tied": ON_OFF,
    "microbatches": ("one", "several", "packed"),
    "dtype": ("fp32", "bf16"),
    "store": tuple(stores()),
    "store_dtype": ("fp32", "bf16"),
    "forward": ("separate", "shared", "one_pass"),
    "scope": tuple(SCOPES),
    "metric": ("euclidean", "adam"),
    "temperature": ("1.0", "0.7"),
    "sampling": ("plain", "edited"),  # with a repetition penalty and kept tokens
}
assert tuple(AXES) == tuple(field.name for field in fields(Setting))


@dataclass(frozen=True)
class Combinations:
    """The valid ones, and how many were refused by which message."""

    valid: list[Setting]
    refused: Counter[str]

    @property
    def total(self) -> int:
        """All, valid or not."""
        return len(self.valid) + self.refused.total()


def parse_where(texts: Sequence[str]) -> dict[str, str]:
    """``key=value`` texts; ``ValueError`` for what is no axis or none of its values."""
    where: dict[str, str] = {}
    for text in texts:
        axis, _, value = text.partition("=")
        if axis not in AXES:
            raise ValueError(f"--where: found {text!r}, accepted: AXIS=VALUE with axes {', '.join(AXES)}")
        if value not in AXES[axis]:
            raise ValueError(f"--where {axis}: found {value!r}, accepted: {', '.join(AXES[axis])}")
        where[axis] = value
    return where


def combinations(shapes: Mapping[str, ModelShape], where: Mapping[str, str] | None = None) -> Combinations:
    """The product of all axes, or its part ``where`` axes have given values, asked of the project's checks.

    ``shapes``: by the model, tied or not: no check depends on that.
    """
    chosen = {axis: (where[axis],) if where and axis in where else values for axis, values in AXES.items()}
    refused: Counter[str] = Counter()
    parts, left = [], math.prod(map(len, chosen.values()))
    for axes, build in _SECTIONS.items():
        tuples = list(itertools.product(*(chosen.pop(axis) for axis in axes)))
        kept = []
        for part in tuples:
            reason = _reason(build, *part)
            if reason is None:
                kept.append(dict(zip(axes, part, strict=True)))
            else:
                refused[reason] += left // len(tuples)
        left = left // len(tuples) * len(kept)
        parts.append(kept)
    ties = chosen.pop("tied")  # which no check sees
    parts += [[{axis: value} for value in values] for axis, values in chosen.items()]
    valid: list[Setting] = []
    for found in itertools.product(*parts):
        values = {axis: value for part in found for axis, value in part.items()}
        both = [Setting(tied=tied, **values) for tied in ties]
        reason = refusal(both[0], shapes[both[0].model])
        if reason is None:
            valid += both
        else:
            refused[reason] += len(ties)
    return Combinations(valid, refused)


def refusal(setting: Setting, shape: ModelShape) -> str | None:
    """Why the project refuses a combination, in its own words; None where it accepts it.

    Or why there is nothing to compare it with.
    """
    if setting.model == "experts" and setting.dtype == "bf16":
        return "experts in bf16: another rounding chooses other experts, which is another function"
    return _reason(lambda: check(config_of(setting, "unused"), shape, LAYOUTS[setting.layout].ranks))


def _reason(build: Callable[..., object], *values: str) -> str | None:
    try:
        build(*values)
    except ValueError as error:  # pydantic's ValidationError is one, too
        return "; ".join(_messages(error))
    return None


def _messages(error: ValueError) -> Iterator[str]:
    if isinstance(error, ValidationError):
        yield from (str(part["msg"]).removeprefix("Value error, ") for part in error.errors())
    else:
        yield str(error)


def config_of(setting: Setting, model: str) -> Config:
    """The configuration of a combination for the Hugging Face directory ``model``; or ``ValueError``."""
    layout = LAYOUTS[setting.layout]
    rows = ROWS // layout.data
    return Config(
        output_dir="unused",
        steps=4,
        micro_batch_size=rows if setting.microbatches == "one" else SEVERAL,
        micro_batch_tokens=PACKED if setting.microbatches == "packed" else None,
        model=_model(model, setting.dtype, setting.recompute, setting.model == "adapters"),
        parallel=_parallel(setting.layout, setting.sequence_parallel),
        data=DataConfig(source="unused", max_prompt_tokens=8),
        rollout=_rollout(setting.temperature, setting.sampling),
        objectives=_objectives(),
        optimizer=_optimizer(setting.distributed, setting.overlap),
        gradients=_gradients(
            setting.store, setting.store_dtype, setting.forward, setting.scope, setting.metric
        ),
    )


# Sections are few and combinations many: every section is validated once, or refused every time it is met.
_T = TypeVar("_T")


def _once(build: Callable[..., _T]) -> Callable[..., _T]:
    @functools.cache
    def outcome(*values: Any) -> _T | ValueError:
        try:
            return build(*values)
        except ValueError as error:
            return error

    @functools.wraps(build)
    def section(*values: Any) -> _T:
        found = outcome(*values)
        if isinstance(found, ValueError):
            raise found
        return found

    return section


@_once
def _rollout(temperature: str, sampling: str) -> RolloutConfig:
    edits: dict[str, Any] = {"top_k": TOP_K, "repetition_penalty": PENALTY} if sampling == "edited" else {}
    return RolloutConfig(
        prompts_per_step=ROWS // 2,
        samples_per_prompt=2,
        max_new_tokens=16,
        temperature=float(temperature),
        **edits,
    )


@_once
def _model(path: str, dtype: str, recompute: str, adapters: bool) -> PolicyConfig:
    lora = {**SETTINGS, "path": adapter_of(path)} if adapters else None
    return PolicyConfig.model_validate({"path": path, "dtype": dtype, "recompute": recompute, "lora": lora})


def adapter_of(model: str) -> str:
    """The directory of a model's adapter."""
    return f"{model}-adapter"


@_once
def _parallel(layout: str, sequence: str) -> ParallelConfig:
    values = {**LAYOUTS[layout].parallel, "sequence_parallel": sequence == "true"}
    return ParallelConfig.model_validate(values)


@_once
def _optimizer(distributed: str, overlap: str) -> OptimizerConfig:
    return OptimizerConfig(
        name="adam",
        lr=RATE,
        schedule="constant",
        warmup_fraction=0.0,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        clip_grad=CLIP,
        distributed=distributed == "true",
        overlap_grad_reduce="reduce" in overlap,
        overlap_param_gather="gather" in overlap,
    )


@_once
def _gradients(store: str, store_dtype: str, forward: str, scope: str, metric: str) -> GradientConfig:
    return GradientConfig.model_validate(
        {
            "store": store,
            "store_dtype": store_dtype,
            "forward": forward,
            "scope": SCOPES[scope],
            "metric": metric,
        }
    )


@functools.cache
def _objectives() -> list[ObjectiveConfig]:
    return [ObjectiveConfig(name=f"o{i}", function="m:f") for i in range(OBJECTIVES)]


# Of all axes those that one section depends on alone: most combinations are refused by one.
_SECTIONS: dict[tuple[str, ...], Callable[..., object]] = {
    ("layout", "sequence_parallel"): _parallel,
    ("distributed", "overlap"): _optimizer,
    ("store", "store_dtype", "forward", "scope", "metric"): _gradients,
}
