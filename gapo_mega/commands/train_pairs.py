"""``gapo-mega train-pairs``: trains a policy on preference pairs of several objectives."""

from __future__ import annotations

from gapo_mega.commands.options import ConfigFile, DryRun, Overrides, Overwrite, Processes, World
from gapo_mega.commands.supervised import run_supervised


def train_pairs(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    world: World = None,
) -> None:
    """Train a policy on preference pairs of several objectives (DPO, IPO, MODPO), without rollouts."""
    from gapo_mega.config.loading import load
    from gapo_mega.config.supervised import PairsConfig
    from gapo_mega.runs.pairs import PairsRun

    settings = load(config, overrides or [], kind=PairsConfig)
    arguments = ["train-pairs", "--config", str(config), *(overrides or [])]
    run_supervised(settings, PairsRun, nproc, arguments, overwrite, dry_run=dry_run, world=world)
