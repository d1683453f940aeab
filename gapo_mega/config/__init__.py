"""The configuration: its sections, their checks, and reading them from YAML.

This file exports the sections of a training run; ``loading`` reads files and overrides; ``supervised`` has
the sections of reward models and fine-tuning.
"""

from gapo_mega.config.fields import LocalPath, Section, TemplatePath
from gapo_mega.config.gradients import GradientConfig
from gapo_mega.config.objective import ObjectiveConfig
from gapo_mega.config.optimizer import CriticConfig, OptimizerConfig
from gapo_mega.config.results import CheckpointConfig, EvaluationConfig, TrainCheckpointConfig
from gapo_mega.config.scalarization import ScalarizationConfig
from gapo_mega.config.sections import (
    AdvantageConfig,
    AggregationConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainLoggingConfig,
)
from gapo_mega.config.vllm import VllmConfig

__all__ = [
    "AdvantageConfig",
    "AggregationConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EvaluationConfig",
    "GradientConfig",
    "LocalPath",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RolloutConfig",
    "ScalarizationConfig",
    "Section",
    "TemplatePath",
    "TrainCheckpointConfig",
    "TrainLoggingConfig",
    "VllmConfig",
]
