"""Token rewards, advantage estimators and whitening, all per objective.

``build("group", baseline="leave_one_out")(experience)`` fills in the advantages. Every file of this
folder that defines an ``AdvantageEstimator`` is an estimator; see docs/extending.md.
"""

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.advantages.registry import build, estimators
from gapo_mega.advantages.rewards import token_rewards, whiten

__all__ = ["AdvantageEstimator", "build", "estimators", "token_rewards", "whiten"]
