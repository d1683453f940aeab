"""Rewards as functions of text. ``build(config).score(prompts, responses)`` gives finite floats.

Every file of this folder that defines an ``ObjectiveKind`` is a kind; see docs/extending.md.
"""

from gapo_mega.objectives.base import Objective, ObjectiveKind
from gapo_mega.objectives.registry import build, build_all, kinds

__all__ = ["Objective", "ObjectiveKind", "build", "build_all", "kinds"]
