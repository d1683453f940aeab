"""The section of a run with a scalarizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from gapo_mega.config.fields import MOST_ROWS, Code, Section


class ScalarizationConfig(Section):
    """What makes one reward or advantage of all scores, so that an update has one gradient.

    With the option ``safe`` it gives weights for the objectives' gradients instead.
    """

    name: Code = Field(description="an entry of gapo_mega.scalarization, or a class of one's own")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the scalarizer")

    @property
    def row(self) -> str:
        """What the log calls the gradient."""
        return self.name.rpartition(":")[2]

    @property
    def safe(self) -> bool:
        """Whether an update has a gradient of every objective, and weights that hurt nobody."""
        return self.options.get("safe") is True


def check_scalarization(
    scalarization: ScalarizationConfig | None,
    aggregation: str | None,
    objectives: Sequence[str],
    every: int,
    kl: str,
) -> None:
    """Raise ``ValueError`` for settings of a run that its scalarizer, or having none, rules out.

    ``aggregation``: the method's name, if the section has settings that do not fit beside a scalarizer.
    ``every``: ``gradients.audit_every``. ``kl``: ``algorithm.kl``.
    """
    if every and (scalarization is None or scalarization.safe):
        which = "without scalarization" if scalarization is None else "with scalarization.options.safe"
        raise ValueError(
            f"gradients.audit_every: found {every} {which}, accepted: 0 (every update measures the "
            "gradients of all objectives)"
        )
    if scalarization is None:
        return
    if scalarization.safe:
        _check_safe(scalarization.name, aggregation, kl)
    else:
        _check_one_signal(scalarization, aggregation, objectives, every, kl)


def _check_safe(name: str, aggregation: str | None, kl: str) -> None:
    if aggregation is not None:
        raise ValueError(
            f"aggregation: found {aggregation} or its options beside scalarization {name} with "
            "scalarization.options.safe, accepted: average and average_dtype alone (the scalarizer gives "
            "the weights)"
        )
    if kl == "objective":
        raise ValueError(
            f"algorithm.kl: found objective with scalarization {name} and scalarization.options.safe, "
            "accepted: reward, loss, apart (the scalarizer has no weight for the KL's row)"
        )


def _check_one_signal(
    scalarization: ScalarizationConfig,
    aggregation: str | None,
    objectives: Sequence[str],
    every: int,
    kl: str,
) -> None:
    if aggregation is not None:
        raise ValueError(
            f"aggregation: found {aggregation} beside scalarization {scalarization.name}, accepted: one of "
            "them (a scalarizer leaves one gradient; method=NAME sets one and resets the other)"
        )
    if kl not in ("reward", "loss"):
        raise ValueError(
            f"algorithm.kl: found {kl} with scalarization {scalarization.name}, accepted: reward, loss (a "
            "scalarizer leaves one gradient, beside which there is no row for the KL)"
        )
    if scalarization.row in objectives:
        raise ValueError(
            f"objectives: found the name {scalarization.row!r}, which the log gives to the scalarizer's "
            "gradient; accepted: another one"
        )
    if every and len(objectives) >= MOST_ROWS:
        raise ValueError(
            f"objectives: found {len(objectives)} with gradients.audit_every {every}, accepted: up to "
            f"{MOST_ROWS - 1} (the scalarizer's gradient is one more row of an audited update)"
        )
