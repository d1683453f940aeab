"""What a finished training run found out and cost, read from its directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gapo_mega.advantages import estimators
from gapo_mega.config import Config
from gapo_mega.config.loading import load
from gapo_mega.evaluation.files import config_file
from gapo_mega.evaluation.series import METRICS_FILE, Series, read_series
from gapo_mega.evaluation.standing import Standing
from gapo_mega.evaluation.summary import SUMMARY_FILE, Summary, read_standing, read_summary
from gapo_mega.planning.backwards import backwards_of_run


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    updates: int  # optimizer steps, skipped ones included
    samples: int  # responses trained on
    backwards: int  # of the policy, each over one minibatch
    reward_calls: int  # scores asked for while training, one for each response and objective
    seconds: float  # wall-clock, those before it was resumed included


@dataclass(frozen=True)
class FinishedRun:
    """A training that has ended."""

    directory: Path
    config: Config
    summary: Summary  # by objective
    kl: float  # mean log pi - log pi_ref of a token over the tenth of the steps that end with the result's
    response_length: float  # tokens, mean over the same steps
    cost: Cost
    standing: Standing  # of which step the summary's numbers are

    @property
    def names(self) -> list[str]:
        """The objectives, in the configuration's order."""
        return [objective.name for objective in self.config.objectives]

    def after(self, names: Sequence[str]) -> tuple[float, ...]:
        """Held-out means after training."""
        return tuple(self.summary[name].after for name in names)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON has it; a number that is not known is null."""
        heldout = {
            name: {
                "before": known(change.before),
                "after": known(change.after),
                "gain": known(change.difference),
                "standard_error": known(change.standard_error),
                "prompts": change.samples,
            }
            for name, change in self.summary.items()
        }
        return {
            "heldout": heldout,
            **self.standing.as_dict(),
            "kl": known(self.kl),
            "response_length": known(self.response_length),
            "seconds": self.cost.seconds,
            "samples": self.cost.samples,
            "backwards": self.cost.backwards,
            "reward_calls": self.cost.reward_calls,
            "updates": self.cost.updates,
        }


def read_run(directory: Path) -> FinishedRun:
    """The training in ``directory``. Raises ``ValueError`` where none has ended there."""
    config_path = config_file(directory)
    for path in (config_path, directory / METRICS_FILE, directory / SUMMARY_FILE):
        if not path.is_file():
            raise ValueError(
                f"run directory: found no {path.name} in {directory}, accepted: the directory of a "
                "gapo-mega train that has ended"
            )
    config = load(config_path)
    summary, seconds = _summary(directory / SUMMARY_FILE)
    missing = [objective.name for objective in config.objectives if objective.name not in summary]
    if missing:
        raise ValueError(
            f"run directory: found no held-out score of {', '.join(missing)} in {directory / SUMMARY_FILE}, "
            "accepted: a run with data.heldout_prompts"
        )
    series = read_series(directory)
    updates = len(series.steps)
    of_a_step = config.algorithm.ppo_epochs * config.algorithm.minibatches
    done = updates // of_a_step
    standing = read_standing(directory / SUMMARY_FILE) or Standing(done, done, config.steps, ended=True)
    if done > standing.done:
        raise ValueError(
            f"run directory: found {directory}, whose {SUMMARY_FILE} is of {standing.done} rollout steps and "
            f"whose {METRICS_FILE} has {updates} optimizer steps, {of_a_step} a rollout step; accepted: the "
            "directory of a training that has ended (this one has trained on since)"
        )
    until = standing.step * of_a_step
    return FinishedRun(
        directory=directory,
        config=config,
        summary=summary,
        kl=_last(series, "kl", until),
        response_length=_last(series, "response_length", until),
        cost=Cost(
            updates=updates,
            samples=done * config.sequences(),
            backwards=backwards_of_run(config, updates, _one_pass(config, series)),
            reward_calls=updates // of_a_step * scored_in_a_step(config) * len(config.objectives),
            seconds=seconds,
        ),
        standing=standing,
    )


def _one_pass(config: Config, series: Series) -> bool:
    """Whether updates of several gradients may have taken one pass.

    The log has the time of every other kind of pass, by objective. An update of one gradient has those of the
    first objective, too. A pipeline that tried one pass and took others says both.
    """
    later = {*config.rows[1:], *config.audited_rows[1:]}
    others = {f"time/{kind}/{name}" for kind in ("forward_backward", "backward") for name in later}
    return "time/one_pass" in series.values or not others & series.values.keys()


def scored_in_a_step(config: Config) -> int:
    """Responses of a step that objectives score: those trained on, and greedy ones of a baseline (ReMax)."""
    estimator = estimators().get(config.advantages.name)
    greedy = config.rollout.prompts_per_step if estimator is not None and estimator.needs_greedy else 0
    return config.sequences() + greedy


def known(value: float) -> float | None:
    """``value`` for JSON, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _summary(path: Path) -> tuple[Summary, float]:
    try:
        return read_summary(path)
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"run directory: found {path}, which is not as gapo-mega train writes it; accepted: the "
            "directory of a training that has ended"
        ) from None


def _last(series: Series, key: str, until: int) -> float:
    """The mean of a metric over a tenth of the steps, up to ``until``; NaN where it is not known."""
    if key not in series.values:
        return math.nan
    values = series.values[key][series.steps <= until][-series.window :]
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
