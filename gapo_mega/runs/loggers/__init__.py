"""Places that show runs. Every file of this folder that defines a ``Logger`` is one.

``metrics.jsonl`` is the record of a run. Loggers are views of it, and none of them can end a run.
"""

from gapo_mega.runs.loggers.base import Logger
from gapo_mega.runs.loggers.registry import build, loggers

__all__ = ["Logger", "build", "loggers"]
