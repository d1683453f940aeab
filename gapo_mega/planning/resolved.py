"""A configuration checked for a number of processes, with everything that the check found out.

``runs.preflight.resolve`` makes it. Trainer, plan, engine and benchmarks take it, so that nobody asks twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.aggregation.base import Aggregator
from gapo_mega.config import Config, strategies
from gapo_mega.config.strategies import PassCount, StrategyDeclaration
from gapo_mega.losses.base import PolicyLoss
from gapo_mega.models.card import Card
from gapo_mega.models.huggingface import location
from gapo_mega.models.shape import ModelShape
from gapo_mega.objectives.base import Objective, ScoreModelRequest
from gapo_mega.planning.layout import data_parallel_size
from gapo_mega.planning.strategy import ForwardKind, forward_kind, microbatches, router_passes
from gapo_mega.scalarization.base import Scalarizer


@dataclass(frozen=True)
class ModelSource:
    """A model that a run loads. Only its configuration has been read: its weights may be on the hub."""

    path: str  # Hugging Face directory or hub name, or a checkpoint
    shape: ModelShape
    parameter: str = "model.path"  # that names it

    def directory(self) -> Path:
        """Its local directory, downloaded if need be. Raises ``ValueError`` where it cannot be had."""
        return location.resolve(self.path, self.parameter)


@dataclass(frozen=True)
class ScoreModelSource:
    """A score model that an objective asks the engine for."""

    request: ScoreModelRequest
    shape: ModelShape


@dataclass(frozen=True)
class ResolvedRun:
    """What a run is made of. Plug-ins are built; no weights, no data and no device have been touched."""

    config: Config
    world: int  # processes
    policy: ModelSource
    critic: ModelSource | None  # backbone of the value models; None: the estimator needs no values
    objectives: Sequence[Objective]
    score_models: Sequence[ScoreModelSource]
    aggregator: Aggregator
    estimator: AdvantageEstimator
    loss: PolicyLoss
    # Models of which only a packaged card was read, by what names them. A plan has such, a run has none.
    cards: Mapping[str, Card] = field(default_factory=dict)
    scalarizer: Scalarizer | None = None  # None: every objective has a gradient of its own

    @property
    def shape(self) -> ModelShape:
        """The policy's shape."""
        return self.policy.shape

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return data_parallel_size(self.config.parallel, self.world)

    @property
    def strategy(self) -> StrategyDeclaration:
        """How the engine measures and holds the gradients of an update."""
        return self.strategy_of(len(self.config.rows))

    def strategy_of(self, rows: int) -> StrategyDeclaration:
        """How the engine measures and holds ``rows`` gradients."""
        gradients = self.config.gradients
        return strategies.chosen(gradients.model_copy(update={"forward": self.forward_of(rows)}))

    @property
    def value_models(self) -> int:
        """Value models; 0 where the estimator needs no values."""
        if self.critic is None:
            return 0
        return 1 if self.config.critic.heads == "shared" else len(self.config.objectives)

    @property
    def value_heads(self) -> int:
        """Outputs of a value model: one for each objective that it values."""
        return len(self.config.objectives) // max(1, self.value_models)

    @property
    def microbatches(self) -> int:
        """Forward passes of a data-parallel rank over one minibatch."""
        return microbatches(self.config, self.data)

    @property
    def forward(self) -> ForwardKind:
        """The kind of passes, where the configuration leaves it open by what else it asks for."""
        return self.forward_of(len(self.config.rows))

    def forward_of(self, rows: int) -> ForwardKind:
        """The kind of passes of an update that measures ``rows`` gradients."""
        by_token = self.critic is not None or self.estimator.by_token
        return forward_kind(self.config, self.data, by_token=by_token, rows=rows)

    @property
    def shared(self) -> bool:
        """Whether one forward per microbatch serves the backwards of all objectives."""
        return self.forward == "shared"

    @property
    def passes(self) -> PassCount:
        """Forwards and backwards of one update; partial backwards (of a scope) are not counted."""
        count = self.strategy.passes(len(self.config.rows), self.shared)
        own = router_passes(self.config)
        return PassCount(count.forwards + own.forwards, count.backwards + own.backwards)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one rollout."""
        return self.config.algorithm.ppo_epochs * self.config.algorithm.minibatches

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole run, over which learning rates fall."""
        return self.config.steps * self.updates_per_step
