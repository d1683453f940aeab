"""Starts a training from its configuration: check, read, build, train."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapo_mega.config import Config
from gapo_mega.data.order import PROMPTS, Order
from gapo_mega.data.prompts import load_prompts
from gapo_mega.engine.base import build_engine
from gapo_mega.files import local
from gapo_mega.models.huggingface import location
from gapo_mega.models.huggingface.token_ids import check_tokens, end_of_sequence_ids, padding_id
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.planning.disk import predict_training
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.rollout import backends
from gapo_mega.rollout.backends import Policy
from gapo_mega.runs import fingerprints
from gapo_mega.runs.directory import Wanted
from gapo_mega.runs.identity import Identity, settings_of
from gapo_mega.runs.preflight import resolve
from gapo_mega.runs.processes import world_size
from gapo_mega.runs.resume import (
    CONFIGURATION,
    CRITIC,
    HELDOUT_ROWS,
    POLICY,
    TEMPLATE,
    TRAINING_ROWS,
)
from gapo_mega.runs.session import Session, check_before_processes, compare_with_newest
from gapo_mega.runs.shared_answers import SharedAnswers
from gapo_mega.runs.trainer import Trainer
from gapo_mega.types import Prompt

COMMAND = "gapo-mega train"


def train(config: Config, overwrite: bool = False) -> bool:
    """Run a whole training on this process's share of the world (torchrun's environment, or alone).

    ``overwrite``: first remove what runs wrote in the output directory. Raises ``ValueError`` for whatever
    can be refused, before a model is built. False after a signal: the run is not at its end.
    """
    return run_training(resolve(config, world_size()), overwrite=overwrite)


def wanted(config: Config) -> Wanted:
    """What a training does in its output directory."""
    keeps = config.logging.responses > 0
    return Wanted(
        COMMAND,
        config.checkpoint,
        config.logging,
        report=True,
        responses=keeps,
        adapter=config.checkpoint.export_adapter,
    )


def identity_of(resolved: ResolvedRun) -> Identity:
    """What the run is, as far as its configuration says."""
    unused = None if resolved.critic else "critic"
    return Identity(COMMAND, settings_of(resolved.config, unused))


def check_before(config: Config, processes: int, overwrite: bool) -> None:
    """What one process can refuse for ``processes`` others that it will start. Raises ``ValueError``."""
    directory = Path(config.output_dir)
    identity = identity_of(resolve(config, processes))
    check_before_processes(directory, wanted(config), overwrite)
    if not overwrite:
        compare_with_newest(config, identity, directory)


def run_training(resolved: ResolvedRun, with_report: bool = True, overwrite: bool = False) -> bool:
    """Read data, build the engine, train; as ``train``.

    ``with_report`` false leaves out what follows the last step: exported model, held-out answers, report.
    """
    config = resolved.config
    with Session(config, Path(config.output_dir), wanted(config), overwrite) as session:
        session.check_settings(identity_of(resolved))
        companions = location.companions_of(resolved.policy.directory())
        tokenizer = read_tokenizer(companions)
        check_tokens(companions, tokenizer, resolved.shape.vocab)
        train_prompts, heldout_prompts = load_prompts(
            config.data, tokenizer, config.seed, config.columns, session.token_cache(config.logging.progress)
        )
        check_heldout(config, len(heldout_prompts))
        for objective in resolved.objectives:
            objective.check_prompts([*train_prompts, *heldout_prompts])
        # Refuses more prompts a step than there are; the trainer builds its own for its data rank.
        Order(len(train_prompts), config.rollout.prompts_per_step, 0, 1, config.seed, wording=PROMPTS)
        eos_ids = end_of_sequence_ids(companions, tokenizer)
        pad_id = padding_id(tokenizer, eos_ids)
        contents = contents_of(resolved, tokenizer, train_prompts, heldout_prompts)
        contents[CONFIGURATION] = fingerprints.of_shape(
            resolved.shape, end_of_sequence=sorted(eos_ids), padding=pad_id
        )
        session.check_contents(contents, config.steps, resolved.total_updates)
        session.check_space(predict_training(resolved))
        session.check_export()
        session.begin()
        shared = None
        if config.evaluation.shared is not None:
            shared = SharedAnswers(
                config.evaluation.shared, session.record(), resolved.world, session.everyone
            )
        engine = build_engine(resolved, pad_id=pad_id, eos_ids=eos_ids)
        policy = Policy(engine, companions, pad_id, tuple(eos_ids), resolved.shape.vocab)
        with closing(backends.find(config.rollout.backend)(policy, config)) as backend:
            trainer = Trainer(
                resolved,
                engine,
                tokenizer,
                train_prompts,
                heldout_prompts,
                with_report=with_report,
                session=session,
                shared=shared,
                backend=backend,
            )
            finished = trainer.run()
        if finished:
            session.end(trainer.loop.step, config.steps)
        # Not after an error: closing waits for ranks that are still in a collective, and hides the error.
        engine.close()
    return finished


def check_heldout(config: Config, prompts: int) -> None:
    """Raise ``ValueError`` where evaluations are asked for and the data leave no held-out prompt."""
    every = config.evaluation.every_steps
    if every and not prompts:
        raise ValueError(
            f"evaluation.every_steps: found {every}, but data.heldout_source or data.source gave none of the "
            f"{config.data.heldout_prompts} held-out prompts; accepted: 0, or data with held-out prompts"
        )


def contents_of(
    resolved: ResolvedRun,
    tokenizer: PreTrainedTokenizerBase,
    train_prompts: Sequence[Prompt],
    heldout_prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """Fingerprints of what the run reads."""
    found = {
        TEMPLATE: fingerprints.of_template(tokenizer, resolved.config.data.chat_template),
        POLICY: fingerprints.of_weights(resolved.policy.directory()),
        TRAINING_ROWS: fingerprints.of_prompts(train_prompts),
        HELDOUT_ROWS: fingerprints.of_prompts(heldout_prompts),
    }
    if resolved.critic is not None:
        found[CRITIC] = fingerprints.of_weights(resolved.critic.directory())
    return found | score_models_in(resolved.config)


def score_models_in(config: Config) -> dict[str, fingerprints.Fingerprint]:
    """Fingerprints of the models on this machine that options of objectives name, with their tokenizers."""
    found = {}
    for index, objective in enumerate(config.objectives):
        for key, value in objective.options.items():
            # os.path: an option may be a text of any length, and Path.is_file raises for what is no name.
            if isinstance(value, str) and os.path.isfile(local(value) / "config.json"):
                found[f"objectives.{index}.options.{key}"] = fingerprints.of_score_model(local(value))
    return found
