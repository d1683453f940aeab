"""The file of further objectives that an evaluation scores by."""

from __future__ import annotations

from pydantic import Field

from gapo_mega.config.fields import Section
from gapo_mega.config.objective import Objectives


class JudgesConfig(Section):
    """Objectives that a model was not trained on."""

    objectives: Objectives = Field(description="the rewards, as in a run's configuration")
