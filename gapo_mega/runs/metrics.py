"""One flat dictionary of everything that an update measured: a line of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from torch import Tensor

from gapo_mega.aggregation import diagnose
from gapo_mega.engine.base import GradientReport, PolicyFacts


def step_metrics(
    report: GradientReport,
    names: Sequence[str],
    *,
    rows: Sequence[str] | None = None,
    rewards: Sequence[float] | None = None,
    kl: float | None = None,
    tokens_per_second: float,
    peak_memory_bytes: int,
    seconds: Mapping[str, float],
    extra: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Everything that an update measured, by the log's names.

    ``names`` are the objectives, and the KL's row behind them where it has one. ``rows``: the gradients of
    the report in a run with a scalarizer, whose own is the last, alone or behind the objectives in an audited
    update. ``rewards`` are batch means of the objectives, in their order; without rollouts there are none,
    and no ``kl``. ``seconds`` are the trainer's phases, to which those of the gradient report are added;
    ``extra`` (the critic's losses, say) is taken as is.

    All gradient facts come from the Gram matrix G and the weights w: norms are sqrt(G_ii), cosines
    G_ij / sqrt(G_ii G_jj) (NaN where a gradient is zero), and ``predicted_change/i`` is (G w)_i, the
    first-order gain of objective i for a plain gradient step of learning rate 1 along the combined
    direction, before clipping: negative means that the step hurts this objective. ``actual_change/i``,
    where it was measured, is the gain from the change that the optimizer really made. ``corner`` is 1 where
    an objective with a gradient got weight 0, ``conflict`` where a predicted change is negative. With a
    scalarizer there is no ``corner``, and ``conflict`` is known of audited updates only.
    ``clip_fraction_BOUND/i`` is the share of tokens that a bound of the loss held back, ``kl_old_new``
    estimates KL(old || new) per token, ``ratio_min`` and ``ratio_max`` are extremes over tokens, and
    ``entropy_estimate`` is the mean of -log pi over the sampled tokens.
    ``averaged_norm`` and ``averaged_cosine`` are those of the gradients' running means, where the weights
    follow from these (``aggregation.average``).
    """
    assert rewards is None or len(rewards) <= len(names), (names, rewards)
    scalarized, names, objectives = rows is not None, rows or names, names
    count = len(names)
    assert len(report.losses) == count, (names, report.losses)
    assert tuple(report.gram.shape) == (count, count), report.gram.shape
    gram = report.gram.double()
    norms = gram.diagonal().clamp(min=0).sqrt()
    found = diagnose(gram, report.weights)
    metrics = {} if rewards is None else _per_objective("reward", objectives[: len(rewards)], rewards)
    metrics |= _per_objective("grad_norm", names, norms.tolist())
    metrics |= _cosines("cosine", gram, norms, names)
    if report.averaged_gram is not None:
        averaged = report.averaged_gram.double()
        lengths = averaged.diagonal().clamp(min=0).sqrt()
        metrics |= _per_objective("averaged_norm", names, lengths.tolist())
        metrics |= _cosines("averaged_cosine", averaged, lengths, names)
    metrics |= _per_objective("weight", names, report.weights.tolist())
    metrics |= _per_objective("predicted_change", names, found.predicted_change.tolist())
    if report.actual_change is not None:
        metrics |= _per_objective("actual_change", names, report.actual_change)
    if kl is not None:
        metrics["kl"] = kl
    metrics |= _per_objective("loss", names, report.losses)
    metrics |= {
        "gradient_norm": report.gradient_norm,
        "clip_factor": report.clip_factor,
        "padding": report.padding,
        "learning_rate": report.learning_rate,
        "skipped": float(report.skipped),
    }
    if not scalarized:
        metrics["corner"] = float(not report.skipped and found.corner)
    if not scalarized or count > len(objectives):
        metrics["conflict"] = float(not report.skipped and found.conflict)
    metrics |= {f"nonfinite/{name}": float(i in report.nonfinite) for i, name in enumerate(names)}
    metrics |= {f"excluded/{name}": float(i in report.excluded) for i, name in enumerate(names)}
    if report.policy is not None:
        metrics |= _policy(report.policy, names)
    metrics |= report.routers
    metrics |= dict(extra or {})
    phases = {**seconds, **_by_name(report.seconds, names)}
    metrics |= {f"time/{phase}": value for phase, value in phases.items()}
    return metrics | {"tokens_per_second": tokens_per_second, "memory/peak_bytes": peak_memory_bytes}


def _policy(found: PolicyFacts, names: Sequence[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for bound, shares in found.clipped.items():
        metrics |= _per_objective(f"clip_fraction_{bound}", names, shares)
    metrics |= {
        "kl_old_new": found.kl,
        "ratio_min": found.ratio_min,
        "ratio_max": found.ratio_max,
        "entropy_estimate": found.entropy_estimate,
    }
    return metrics if found.entropy is None else metrics | {"entropy": found.entropy}


def _by_name(seconds: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The engine numbers the passes of objectives; the log has their names, after all other phases."""
    numbered = {
        f"{kind}/{index}": f"{kind}/{name}"
        for index, name in enumerate(names)
        for kind in ("forward_backward", "backward")
    }
    others = {phase: value for phase, value in seconds.items() if phase not in numbered}
    return others | {name: seconds[number] for number, name in numbered.items() if number in seconds}


def _per_objective(prefix: str, names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in zip(names, values, strict=True)}


def _cosines(prefix: str, gram: Tensor, norms: Tensor, names: Sequence[str]) -> dict[str, float]:
    # Divided one norm after the other: the product of two tiny norms may underflow.
    cosines = gram / norms[:, None] / norms[None, :]
    return {
        f"{prefix}/{names[i]}/{names[j]}": float(cosines[i, j]) for i, j in combinations(range(len(names)), 2)
    }
