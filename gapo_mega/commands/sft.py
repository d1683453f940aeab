"""``gapo-mega sft``: fine-tunes a language model on conversations."""

from __future__ import annotations

from gapo_mega.commands.options import ConfigFile, DryRun, Overrides, Overwrite, Processes, World
from gapo_mega.commands.supervised import run_supervised


def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    world: World = None,
) -> None:
    """Fine-tune a language model on conversations, as a warm start of a later training."""
    from gapo_mega.config.loading import load
    from gapo_mega.config.supervised import SftConfig
    from gapo_mega.runs.supervised import SftRun

    settings = load(config, overrides or [], kind=SftConfig)
    arguments = ["sft", "--config", str(config), *(overrides or [])]
    run_supervised(settings, SftRun, nproc, arguments, overwrite, dry_run=dry_run, world=world)
