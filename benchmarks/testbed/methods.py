"""Which methods are compared, each as a configuration of the package would name it, and what is tuned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from benchmarks.testbed.regimes import Regime

# Tuning begins with these and goes on while the best one lies at an end, down and up to the limits.
LEARNING_RATES = (0.01, 0.02, 0.04)
LOWEST_RATE, HIGHEST_RATE = 0.00125, 0.32
# Methods that normalise scores have no common unit for scores and KL, so theirs is tuned, too.
KL_FACTORS = (0.35, 0.7, 1.0, 1.4, 2.0, 2.8)
AVERAGE = 0.9
ANSWERS = 256  # before training, of which a run with as many held-out answers knows its start
WEIGHTED_SUM, GDPO = "weighted_sum", "gdpo"  # what all others are compared with

Kind = Literal["aggregation", "scalarization"]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One choice of all that is tuned."""

    rate: float  # the first learning rate; it falls linearly to 0
    kl: float = 1.0  # times beta: weight of the KL that the method sees
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A method as ``gapo_mega`` builds it.

    ``average``: of ``aggregation.average``. ``apart``: ``algorithm.kl: apart``. ``normalized``: advantages by
    the estimator ``grpo``, in place of ``rloo``. ``start_known``: the progress begins with the true mean and
    spread of the scores in place of the first batch's, ``start_answers``: with those of so many answers
    before training, as in a run that holds out prompts. ``depends``: options that follow from the regime,
    such as the scores' sizes. ``preferred``: the option with a number per objective, for fronts over
    preferences. ``metric``: of ``gradients.metric``. ``prompts``: contexts of a step.
    """

    label: str
    kind: Kind
    name: str
    options: Options = field(default_factory=dict)
    average: float = 0.0
    apart: bool = False
    normalized: bool = False
    start_known: bool = False
    start_answers: int = 0
    tuned: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    kl_factors: Sequence[float] = (1.0,)
    depends: Callable[[Regime], Options] | None = None
    preferred: str | None = None
    metric: Literal["euclidean", "adam"] = "euclidean"
    prompts: int = 8

    def described(self) -> str:
        """All that changes what it does, as text: fields that are not at their defaults."""
        return ", ".join(
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if one.name not in ("label", "depends") and getattr(self, one.name) != one.default
        )

    def options_in(self, regime: Regime, setting: Setting) -> dict[str, Any]:
        """All options, for the package's ``build``."""
        given = {} if self.depends is None else self.depends(regime)
        return {**self.options, **given, **setting.options}

    @property
    def of_gradients(self) -> bool:
        """Whether it needs the gradient of every objective."""
        return self.kind == "aggregation"

    def settings(self, rates: Sequence[float]) -> Iterator[Setting]:
        """The grid that tuning tries with these learning rates."""
        for rate, kl in itertools.product(rates, self.kl_factors):
            for values in itertools.product(*self.tuned.values()):
                yield Setting(rate, kl, dict(zip(self.tuned, values, strict=True)))


def _sizes(regime: Regime) -> Options:
    return {"losses": list(regime.scales)}


def _aggregations() -> dict[str, Method]:
    def method(label: str, name: str, **rest: Any) -> Method:
        return Method(label, "aggregation", name, **rest)

    gapo = method("GAPO, p = 1", "gapo")
    adaptive = replace(
        gapo,
        label="GAPO, adaptive rates",
        options={"rates": "adaptive"},
        tuned={"eta": (1.0, 4.0)},
        preferred="preference",
    )
    p_gapo = method("P-GAPO", "p_gapo", preferred="preference")
    tchebycheff = method(
        "Tchebycheff, safe", "tchebycheff_safe", tuned={"mu": (0.1, 0.3)}, preferred="preference"
    )
    upgrad = method("UPGrad", "upgrad", preferred="preference")
    weighted = method("weighted sum of gradients", "weighted_sum", preferred="weights")
    return {
        "gapo": gapo,
        "gapo_p2": replace(gapo, label="GAPO, p = 2", options={"p": 2.0}),
        "gapo_averaged": _averaged(gapo),
        "gapo_apart": replace(gapo, label="GAPO, KL apart", apart=True, kl_factors=KL_FACTORS[1:-1]),
        "gapo_averaged_half": replace(_averaged(gapo), label="GAPO, averaged by 0.5", average=0.5),
        "gapo_adam": replace(gapo, label="GAPO, Adam's metric", metric="adam"),
        "gapo_adam_averaged": replace(
            _averaged(gapo), label="GAPO, Adam's metric, averaged rows", metric="adam"
        ),
        "gapo_few": replace(gapo, label="GAPO, 2 contexts a step", prompts=2),
        "gapo_many": replace(gapo, label="GAPO, 32 contexts a step", prompts=32),
        "gapo_adaptive_averaged": _averaged(adaptive),
        "gapo_adaptive_averaged_known": _start_known(_averaged(adaptive)),
        "gapo_adaptive_averaged_told": _start_told(_averaged(adaptive)),
        "p_gapo": p_gapo,
        "p_gapo_safe_averaged": _averaged(replace(p_gapo, label="P-GAPO, safe", options={"safe": True})),
        "tchebycheff_safe": tchebycheff,
        "tchebycheff_safe_averaged": _averaged(tchebycheff),
        "tchebycheff_safe_averaged_known": _start_known(_averaged(tchebycheff)),
        "tchebycheff_safe_averaged_told": _start_told(_averaged(tchebycheff)),
        "gdpo_safe_averaged": _averaged(
            replace(
                weighted,
                label="normalized scores, safe",
                options={"safe": True},
                normalized=True,
                kl_factors=KL_FACTORS[:3],
            )
        ),
        "mgda": method("MGDA", "mgda"),
        "mgda_decoupled": method("MGDA, decoupled", "mgda_decoupled", depends=_sizes),
        "upgrad": upgrad,
        "upgrad_normalized_averaged": _averaged(
            replace(upgrad, label="UPGrad of normalized scores", normalized=True, kl_factors=KL_FACTORS[:3])
        ),
        "dual_proj": method("DualProj", "dual_proj"),
        "pcgrad": method("PCGrad", "pcgrad"),
        "cagrad": method("CAGrad", "cagrad"),
        "cagrad_clip": method("CAGrad-Clip", "cagrad_clip"),
        "aligned_mtl": method("Aligned-MTL", "aligned_mtl"),
        "imtl_g": method("IMTL-G", "imtl_g", options={"ascend": True}),
        "nash_mtl": method("Nash-MTL", "nash_mtl"),
        "fairgrad": method("FairGrad", "fairgrad", options={"alpha": 2.0}),
    }


def _averaged(method: Method) -> Method:
    return replace(method, label=f"{method.label}, averaged rows", average=AVERAGE)


def _start_known(method: Method) -> Method:
    return replace(method, label=f"{method.label}, start known", start_known=True)


def _start_told(method: Method) -> Method:
    return replace(method, label=f"{method.label}, start from {ANSWERS} answers", start_answers=ANSWERS)


def _scalarizations() -> dict[str, Method]:
    def method(label: str, name: str, **rest: Any) -> Method:
        return Method(label, "scalarization", name, **rest)

    normalizing: dict[str, Any] = {"kl_factors": KL_FACTORS}
    tchebycheff = method(
        "smooth Tchebycheff", "tchebycheff", tuned={"mu": (0.1, 0.3)}, preferred="preference"
    )
    return {
        WEIGHTED_SUM: method("weighted sum", "morlhf", preferred="preference"),
        GDPO: method("GDPO", "gdpo", preferred="weights", **normalizing),
        "mo_grpo": method("MO-GRPO", "mo_grpo", **normalizing),
        "rvpo": method("RVPO", "rvpo", **normalizing),
        "gd2po": method("GD2PO", "gd2po", **normalizing),
        "ctwa": method("CTWA", "ctwa"),
        "gapo_advantages": method("GAPO of advantages", "gapo_advantages"),
        "fast_rl": method("Fast RL", "fast_rl"),
        "safe_rlhf": method("Safe RLHF", "safe_rlhf", tuned={"lambda_lr": (0.1, 1.0)}),
        "tchebycheff": tchebycheff,
        "tchebycheff_known": _start_known(tchebycheff),
        "tchebycheff_told": _start_told(tchebycheff),
    }


METHODS: dict[str, Method] = _scalarizations() | _aggregations()

# Of these the tables say most; they are also compared at equal compute.
CORE = (
    WEIGHTED_SUM,
    GDPO,
    "gapo",
    "gapo_averaged",
    "gapo_adaptive_averaged",
    "tchebycheff",
    "tchebycheff_safe_averaged",
    "mgda",
    "upgrad",
    "upgrad_normalized_averaged",
    "gapo_adaptive_averaged_known",
    "tchebycheff_known",
    "tchebycheff_safe_averaged_known",
    "p_gapo",
    "p_gapo_safe_averaged",
    "safe_rlhf",
    "gapo_adaptive_averaged_told",
    "tchebycheff_told",
    "tchebycheff_safe_averaged_told",
)
