"""``gapo-mega train-reward``: trains a reward model on preference pairs."""

from __future__ import annotations

from gapo_mega.commands.options import ConfigFile, DryRun, Overrides, Overwrite, Processes, World
from gapo_mega.commands.supervised import run_supervised


def train_reward(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    world: World = None,
) -> None:
    """Train a reward model on preference pairs (Bradley-Terry), for the objectives of a later training."""
    from gapo_mega.config.loading import load
    from gapo_mega.config.supervised import RewardModelConfig
    from gapo_mega.runs.supervised import RewardRun

    settings = load(config, overrides or [], kind=RewardModelConfig)
    arguments = ["train-reward", "--config", str(config), *(overrides or [])]
    run_supervised(settings, RewardRun, nproc, arguments, overwrite, dry_run=dry_run, world=world)
