"""Starts a training from its configuration: check, read, build, train."""

from __future__ import annotations

from pathlib import Path

from gapo_mega.config import Config
from gapo_mega.config.loading import dump
from gapo_mega.data.order import PROMPTS, Order
from gapo_mega.data.prompts import load_prompts
from gapo_mega.engine.base import build_engine
from gapo_mega.evaluation.report import CONFIG_FILE
from gapo_mega.models.huggingface import location
from gapo_mega.models.huggingface.token_ids import check_tokens, end_of_sequence_ids
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.runs.preflight import resolve
from gapo_mega.runs.processes import world_size
from gapo_mega.runs.trainer import Trainer


def train(config: Config) -> None:
    """Run a whole training on this process's share of the world (torchrun's environment, or alone).

    Raises ``ValueError`` for whatever can be refused, before a model is built.
    """
    run_training(resolve(config, world_size()))


def run_training(resolved: ResolvedRun, with_report: bool = True) -> None:
    """Read data, build the engine, train.

    ``with_report`` false leaves out what follows the last step: exported model, held-out answers, report.
    """
    config = resolved.config
    companions = location.companions_of(resolved.policy.directory())
    tokenizer = read_tokenizer(companions)
    check_tokens(companions, tokenizer, resolved.shape.vocab)
    train_prompts, heldout_prompts = load_prompts(config.data, tokenizer, config.seed)
    # Refuses more prompts a step than there are; the trainer builds its own for its data rank.
    Order(len(train_prompts), config.rollout.prompts_per_step, 0, 1, config.seed, wording=PROMPTS)
    eos_ids = end_of_sequence_ids(companions, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    engine = build_engine(resolved, pad_id=pad_id, eos_ids=eos_ids)
    if engine.layout.is_main:
        dump(config, Path(config.output_dir) / CONFIG_FILE)
    Trainer(resolved, engine, tokenizer, train_prompts, heldout_prompts, with_report=with_report).run()
    # Not after an error: closing waits for ranks that are still in a collective, and hides the error.
    engine.close()
