"""How many backward passes a run takes, from its configuration alone."""

from __future__ import annotations

from gapo_mega import advantages
from gapo_mega.config import Config, strategies
from gapo_mega.planning.strategy import forward_kind, router_passes


def backwards_of_run(config: Config, updates: int, one_pass: bool = True) -> int:
    """Full backward passes of the policy over a minibatch in ``updates`` optimizer steps.

    ``one_pass``: whether the model handed over gradients of sequences; Transformer Engine's layers do not.

    Partial passes (of a scope) and further passes of ``one_pass`` where sequences need several directions are
    not counted; ``planning.resolved`` has the same numbers for one update.
    """
    every = config.gradients.audit_every
    audits = updates // every if every and config.audited_rows else 0
    plain = (updates - audits) * _of_update(config, len(config.rows), one_pass)
    return plain + (audits * _of_update(config, len(config.audited_rows), one_pass) if audits else 0)


def _of_update(config: Config, rows: int, one_pass: bool) -> int:
    estimator = advantages.build(config.advantages.name, **config.advantages.options)
    by_token = estimator.needs_values or estimator.by_token
    # Over how many replicas a minibatch is spread decides between shared and separate forwards only.
    # Without one pass ``auto`` takes what it takes for advantages of tokens.
    forward = forward_kind(config, 1, by_token=by_token or not one_pass, rows=rows)
    gradients = config.gradients.model_copy(update={"forward": forward})
    own = strategies.chosen(gradients).passes(rows, forward == "shared").backwards
    return own + router_passes(config).backwards
